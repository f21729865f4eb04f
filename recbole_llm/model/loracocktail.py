"""LoRACocktail: a base spirit for all domains and an ingredient for one, mixed by how sure the mixture is.

Hou et al., "RecCocktail: A Generalizable and Efficient Framework for LLM-Based Recommendation", AAAI 2026 (arXiv 2502.08271
v2). Three stages on one frozen LM:

1. base spirit: a LoRA on the training data of general domains;
2. ingredient: a LoRA on the target domain, from the pre-trained LM again and not from the base spirit;
3. cocktail: everything frozen, only the coefficients are chosen, by the least entropy on unlabelled prompts (eq. 9)::

       W x + l_1 s_1 B_1 A_1 x + l_2 s_2 B_2 A_2 x,     l_1 + l_2 = 1

Products are mixed as in the published code; equations 6 and 7 mix A's and B's apart, which adds cross terms. The mixture is
kept as one ordinary PEFT adapter of rank r_1 + r_2.
"""

from __future__ import annotations

from typing import Any

from recbole_llm.data import domains
from recbole_llm.model.merging_ranker import MergingRanker
from recbole_llm.store.stages import Stage


class LoRACocktail(MergingRanker):
    """Base spirit + ingredient, mixed by entropy-guided coefficients."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.general = domains.named_or_views("general_datasets", config, (self.domain, self.histories))
        self.general_samples = config["general_samples"]

    def plan(self) -> Stage:
        base_spirit = self.lora_stage("base-spirit", self.general, stop_on_target=False, samples=self.general_samples)
        ingredient = self.lora_stage("ingredient", [self.domain])
        return self.merge_stage("cocktail", {"base spirit": base_spirit, "ingredient": ingredient})
