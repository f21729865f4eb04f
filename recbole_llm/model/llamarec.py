"""LlamaRec: a retriever and one LoRA that predicts the label of a candidate.

Yue et al., "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking", PGAI@CIKM 2023 (arXiv 2311.02089). A
sequential model retrieves twenty items, and a prompt lists them as A, B, C, ... The *verbalizer* ranks them by the logits of
their labels at one position, in a single forward pass without generation. The LoRA is trained to predict the label of the next
item among sampled negatives. ``retriever`` names the sequential model (LRURec in the paper), used in full rankings only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.ranker import LLMRanker


class LlamaRec(LLMRanker):
    """One LoRA, trained to predict the label of the next item."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if not self.parts.scoring.reads_labels:
            raise ValueError(f"scorer: LlamaRec reads the logits of labels, not {config['scorer']}; leave out scorer")
        self.candidate_files = config["candidates"]["file"] if config["candidates"]["source"] == "file" else {}

    def _check_labels(self, what: str, candidates: int) -> None:
        labels = len(self.parts.prompts.labels or ())
        if candidates > labels:
            raise ValueError(
                f"{what} lists {candidates} candidates, but with candidates.num_negatives: {labels - 1} prompts have {labels} "
                f"labels; give candidates: {{'num_negatives': {candidates - 1}}}"
            )

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        for phase, file in self.candidate_files.items():
            self._check_labels(f"candidates.file: {file}", candidates[phase].items.size(1))
        return {"tuned": AdapterSpec("verbalizer", [self.parts.domain], self.adapter_training.valid(candidates))}
