"""LoRACocktail: a domain-general LoRA (base spirit) and a domain-specific one (ingredient), mixed at minimum entropy.

Hou et al., "RecCocktail: A Generalizable and Efficient Framework for LLM-Based Recommendation", AAAI 2026 (arXiv 2502.08271
v2). Three stages on one frozen LM:

1. base spirit: a LoRA on the training data of general domains;
2. ingredient: a LoRA on the target domain, from the pre-trained LM again and not from the base spirit;
3. cocktail: all weights are frozen; the coefficients minimize the entropy on unlabelled prompts (eq. 9)::

       W x + l_1 s_1 B_1 A_1 x + l_2 s_2 B_2 A_2 x,     l_1 + l_2 = 1

As in the published code, the products B A are mixed; equations 6 and 7 mix A and B separately, which adds cross terms. The
result is one ordinary PEFT adapter of rank r_1 + r_2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation.published import RECCOCKTAIL
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.merges.rows import MergeRows
from recbole_llm.model.merges.stages import AdapterMerging
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Stage

BASE_SPIRIT, INGREDIENT = "base spirit", "ingredient"


class LoRACocktail(LLMRanker):
    """Base spirit + ingredient, mixed with entropy-guided coefficients."""

    published = RECCOCKTAIL
    merge_rows: MergeRows

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        needed = BASE_SPIRIT not in self.given.given  # a given base spirit needs no general domain
        if config["general_datasets"] and not needed:
            raise ValueError(
                f"general_datasets: {config['general_datasets']} train the {BASE_SPIRIT}, which adapters gives; give one of them"
            )
        target = self.parts.domain, self.parts.histories
        self.general = domains.named_or_views("general_datasets", config, target) if needed else []
        general = {key: config[f"general_{key}"] for key in ("samples", "positions", "epochs", "held_out")}
        self.general_training = replace(self.adapter_training.config, **general)
        self.merging = AdapterMerging.of(config, self.parts, self.shape)
        self.decoded_titles = self.merging.decoded_titles
        self.merge_rows = MergeRows("cocktail", config, self.merging, self.adapter_training, self.given)

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        return {
            BASE_SPIRIT: AdapterSpec("base-spirit", self.general, training=self.general_training),
            INGREDIENT: AdapterSpec("ingredient", [self.parts.domain], self.adapter_training.valid(candidates)),
        }

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        sources = self.adapter_stages(candidates)
        self.check_rows("merge_beside", self.merging.others)
        self.merge_rows.plan(sources, self.trained(candidates), candidates, target=INGREDIENT)
        self.measures_merges = self.merge_rows.report
        return [*self.merge_rows.stages.values(), *self.other_stages()]

    def mixtures(self) -> dict[str, list[str]]:
        # with merge: uniform it is the model's own row
        return {} if self.merging.settings.method == "uniform" else {"uniform mix": list(self.sources)}
