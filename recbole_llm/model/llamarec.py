"""LlamaRec: one LoRA that answers with a candidate's label, behind a retriever.

Yue et al., "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking", PGAI@CIKM 2023 (arXiv 2311.02089). A
sequential model retrieves twenty items; a prompt lists them as A, B, C, ...; the *verbalizer* reads the logits of the labels at
one position, so all candidates are ranked in a single forward pass and nothing is generated. The LoRA is trained on the label of
the next item among sampled others. ``retriever`` names the sequential model (LRURec in the paper), which is used where a ranking
of the whole catalogue is asked for; on given candidates the verbalizer ranks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Folders, Stage


class LlamaRec(LLMRanker):
    """One LoRA, trained to name the label of the next item."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if not self.parts.scoring.reads_labels:
            raise ValueError(f"scorer: LlamaRec reads the logits of labels, not {config['scorer']}; leave scorer out")

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        valid = self.parts.eval_users(candidates)
        self.tuned = self.adapter_training.stage("verbalizer", [self.parts.domain], valid=valid)
        return [self.tuned, *self.retrieval()]

    def adapters(self, results: Folders) -> dict[str, Path]:
        return {"tuned": results.folder(self.tuned)}
