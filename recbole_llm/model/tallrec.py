"""TALLRec: one LoRA on the target domain, in the list-wise form that RecCocktail and A-LLMRec use as a baseline.

Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with Recommendation", RecSys
2023 (arXiv 2305.00447). The original predicts Yes or No for one item. These papers train its LoRA on their own list-wise
prompts, and so does this model: it trains one adapter of a frozen LM on the target and ranks by title likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.ranker import LLMRanker


class TALLRec(LLMRanker):
    """One LoRA, trained on the target's training split."""

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        return {"tuned": AdapterSpec("ingredient", [self.parts.domain], self.adapter_training.valid(candidates))}
