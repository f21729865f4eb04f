"""LoRACocktail: a base spirit for all domains and an ingredient for one, mixed by how sure the mixture is.

Hou et al., "RecCocktail: A Generalizable and Efficient Framework for LLM-Based Recommendation", AAAI 2026 (arXiv 2502.08271
v2). Three stages on one frozen LM:

1. base spirit: a LoRA on the training data of general domains;
2. ingredient: a LoRA on the target domain, from the pre-trained LM again and not from the base spirit;
3. cocktail: everything frozen, only the coefficients are chosen, by the least entropy on unlabelled prompts (eq. 9)::

       W x + l_1 s_1 B_1 A_1 x + l_2 s_2 B_2 A_2 x,     l_1 + l_2 = 1

Products are mixed as in the published code; equations 6 and 7 mix A's and B's apart, which adds cross terms. The mixture is
kept as one ordinary PEFT adapter of rank r_1 + r_2, so inference costs what a single adapter costs.

Legend: K adapters, M adapted modules, C candidates.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.backbone.lora import load_adapters, lora_modules, mixture
from recbole_llm.data import domains
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.objectives import candidate_entropy, first_k_entropy, mean_over_batches
from recbole_llm.merging.stage import merge_adapters, resolve
from recbole_llm.model.lora_ranker import LoRARanker
from recbole_llm.training.stages import Stage


class LoRACocktail(LoRARanker):
    """Base spirit + ingredient, mixed by entropy-guided coefficients."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.general = self._general_domains(config)
        self.general_samples = config["general_samples"]
        self.method = config["merge"]
        self.granularity = config["merge_granularity"]
        self.split = config["merge_split"]
        self.prompt_count = config["merge_prompts"]
        self.first_tokens = config["merge_first_tokens"]
        self.compress_rank = config["merge_compress_rank"]
        self.settings = {
            "weights": config["merge_weights"],
            "extrapolate": config["merge_extrapolate"],
            "points": config["merge_points"],
            "steps": config["merge_steps"],
            "lr": config["merge_learning_rate"],
        }
        self.merge_report: dict[str, Any] = {}
        # asked now: after two trainings is late for a typing error
        self.method_source = inspect.getsource(sys.modules[resolve(self.method).__module__])
        if self.granularity not in ("global", "module"):
            raise ValueError(f"merge_granularity: {self.granularity} is neither global nor module")
        if self.split not in self.asked:
            raise ValueError(f"merge_split: {self.split} is not one of {', '.join(self.asked)}")

    def _general_domains(self, config: Any) -> list[domains.Domain]:
        """Other datasets, or views of the target's own training data where none is named."""
        if config["general_datasets"]:
            return domains.load(config["general_datasets"], config)
        found = domains.views(
            self.domain, config["domain_field"] or config["category_field"],
            at_least=config["domain_min_users"], at_most=config["domain_max_views"],
        )  # fmt: skip
        self.logger.info(
            f"general_datasets: none given, so the base spirit is trained on {len(found)} views of {self.domain.name} by "
            f"category: {', '.join(view.name.split('/')[-1] for view in found)}"
        )
        return found

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        base_spirit = self.lora_stage("base-spirit", self.general, stop_on_target=False, samples=self.general_samples)
        ingredient = self.lora_stage("ingredient", [self.domain])
        self.sources = {"base spirit": base_spirit, "ingredient": ingredient}
        depends = {
            "method": [self.method, self.method_source],  # a function of the user's changes as its file does
            "granularity": self.granularity,
            "prompts": [self.split, self.asked[self.split].fingerprint, self.prompt_count],
            "scores": [self.normalize, self.first_tokens],
            "settings": self.settings,
            "compress_rank": self.compress_rank,
        }
        return Stage("cocktail", depends, self._mix, inputs=(base_spirit, ingredient))

    def finished(self, folder: Path) -> dict[str, Path]:
        self.merge_report = json.loads((folder / "merged" / "merge.json").read_text())
        return {"merged": folder / "merged"} | self._source_folders()

    def _source_folders(self) -> dict[str, Path]:
        return {name: self.keeper.folder(stage) for name, stage in self.sources.items()}

    def _mix(self, out: Path, scratch: Path) -> None:
        folders = self._source_folders()
        self.lm = load_adapters(self._bare(), folders)
        problem = MergeProblem(
            names=list(folders),
            modules=list(lora_modules(self.lm)),
            granularity=self.granularity,
            objective=mean_over_batches(self._entropy, self._prompt_batches()),
            valid_score=self._valid_score,
            settings=self.settings,
        )
        self._by_name = problem.by_name
        merge_adapters(
            folders, self.method, problem, out / "merged", split=self.split, compress_rank=self.compress_rank
        )

    # -- what the coefficients are chosen by ---------------------------------------------------------------------------

    def _prompt_batches(self) -> list[list[tuple[list[int], Tensor]]]:
        """Unlabelled prompts as batches of (history, candidates [C]); the targets are dropped here."""
        asked = self.asked[self.split].draw(self.prompt_count)
        pairs = list(zip(asked.histories, asked.candidates, strict=True))
        return [pairs[i : i + 25] for i in range(0, len(pairs), 25)]

    def _entropy(self, weights: Tensor, batch: list[tuple[list[int], Tensor]]) -> Tensor:
        """Mean entropy (nats) of a batch at weights [K] or [M, K]."""
        histories, candidates = [history for history, _ in batch], torch.stack([row for _, row in batch])  # [B, C]
        with mixture(self.lm, self._by_name(weights)):
            if not self.first_tokens:
                return candidate_entropy(self.score_histories(histories, candidates))
            shown = candidates.tolist() if self.prompts.shows_candidates else [None] * len(histories)
            prompts = [self.prompts.prompt(history, row) for history, row in zip(histories, shown, strict=True)]
            return first_k_entropy(
                self.lm, prompts, self.first_tokens, self.pad_token_id, self.tokenizer.eos_token_id
            )

    def _valid_score(self, weights: Tensor) -> float:
        """Labelled validation score at weights [K] or [M, K]: what ``merge: grid`` maximises."""
        with mixture(self.lm, self._by_name(weights)):
            return self.asked["valid"].score()

    # -- controls ------------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        return {"uniform mix": self._uniform, **super().controls()}

    @contextlib.contextmanager
    def _uniform(self) -> Iterator[None]:
        share = torch.tensor(1 / len(self.sources))
        with mixture(self.lm, dict.fromkeys(self.sources, share)), self._answering("uniform mix"):
            yield
