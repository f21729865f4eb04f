"""TALLRec: one LoRA on the target domain, in the list-wise form that RecCocktail and A-LLMRec use as a baseline.

Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with Recommendation", RecSys
2023 (arXiv 2305.00447). The original predicts Yes or No for one item. These papers train its LoRA on their own list-wise
prompts, and so does this model: it trains one adapter of a frozen LM on the target and ranks by title likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation.published import RECCOCKTAIL
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Folders, Stage


class TALLRec(LLMRanker):
    """One LoRA, trained on the target's training split."""

    published = RECCOCKTAIL

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        valid = self.parts.eval_users(candidates)
        self.tuned = self.adapter_training.stage("ingredient", [self.parts.domain], valid=valid)
        return [self.tuned, *self.retrieval()]

    def adapters(self, results: Folders) -> dict[str, Path]:
        return {"tuned": results.folder(self.tuned)}
