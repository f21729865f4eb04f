"""LlamaRec: one LoRA that answers with a candidate's letter, behind a retriever.

Yue et al., "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking", PGAI@CIKM 2023 (arXiv 2311.02089). A
sequential model retrieves twenty items; a prompt lists them as A, B, C, ...; the *verbaliser* reads the logits of the letters at
one position, so all candidates are ranked in a single forward pass and nothing is generated. The LoRA is trained on the letter of
the next item among sampled others. ``retriever`` names the sequential model (LRURec in the paper), which comes in where a ranking
of the whole catalogue is asked for; on candidates that are given, as everywhere, it is the verbaliser alone that ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_llm.model.lora_ranker import LoRARanker
from recbole_llm.store.stages import Stage


class LlamaRec(LoRARanker):
    """One LoRA, trained to name the letter of the next item."""

    def __init__(self, config: Any, dataset: Any):
        if config["scorer"] != "label":
            raise ValueError(f"scorer: LlamaRec reads the logits of letters, not {config['scorer']}; leave scorer out")
        super().__init__(config, dataset)

    def plan(self) -> Stage:
        return self.lora_stage("verbaliser", [self.domain])

    def finished(self, folder: Path) -> dict[str, Path]:
        return {"tuned": folder}
