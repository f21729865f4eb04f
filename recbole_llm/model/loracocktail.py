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
from pathlib import Path
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.model.merged import AdapterMerging, MergeSettings
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Folders, Stage


class LoRACocktail(LLMRanker):
    """Base spirit + ingredient, mixed with entropy-guided coefficients."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.general = domains.named_or_views("general_datasets", config, (self.parts.domain, self.parts.histories))
        self.general_samples = config["general_samples"]
        self.merging = AdapterMerging(self.parts, MergeSettings.of(config), self.adapter_training.config)

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        valid = self.parts.eval_users(candidates)
        self.sources = {
            "base spirit": self.adapter_training.stage("base-spirit", self.general, samples=self.general_samples),
            "ingredient": self.adapter_training.stage("ingredient", [self.parts.domain], valid=valid),
        }
        self.cocktail = self.merging.stage("cocktail", self.sources, candidates)
        return [self.cocktail, *self.retrieval()]

    def adapters(self, results: Folders) -> dict[str, Path]:
        merged = {"merged": results.folder(self.cocktail) / "merged"}
        return merged | {name: results.folder(stage) for name, stage in self.sources.items()}

    def mixtures(self) -> dict[str, list[str]]:
        # with merge: uniform it is the model's own row
        return {} if self.merging.settings.method == "uniform" else {"uniform mix": list(self.sources)}
