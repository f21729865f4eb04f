"""TALLRec: one LoRA on the target domain, in the list-wise form that RecCocktail and A-LLMRec compare with.

Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with Recommendation", RecSys
2023 (arXiv 2305.00447). The original answers Yes or No about one item; the papers we compare with train its LoRA on their own
list-wise prompt instead, and so does this file: freeze the LM, train one adapter on the target, rank by title likelihood.
"""

from __future__ import annotations

from pathlib import Path

from recbole_llm.model.lora_ranker import LoRARanker
from recbole_llm.store.stages import Stage


class TALLRec(LoRARanker):
    """One LoRA, trained from the pre-trained LM on the target's training split."""

    def plan(self) -> Stage:
        return self.lora_stage("ingredient", [self.domain])

    def finished(self, folder: Path) -> dict[str, Path]:
        return {"tuned": folder}
