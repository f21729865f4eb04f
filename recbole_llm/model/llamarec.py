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

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        return {"tuned": AdapterSpec("verbalizer", [self.parts.domain], self.adapter_training.valid(candidates))}
