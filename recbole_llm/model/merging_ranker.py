"""Rankers whose answer is a mixture of adapters: a model names the adapters, the merge stage does the rest.

Everything is frozen in that stage; only the coefficients are chosen, by the method that ``merge`` names
(``merging/stage.py``). The mixture is kept as one ordinary PEFT adapter, so inference costs what a single adapter costs.

Legend: K adapters, M adapted modules, C candidates.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.evaluation.plots import heat_map
from recbole_llm.llm.lora import load_adapters, lora_modules, mixture
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.objectives import candidate_entropy, first_k_entropy, mean_over_batches
from recbole_llm.merging.stage import merge_adapters, resolve
from recbole_llm.model.lora_ranker import LoRARanker
from recbole_llm.store.stages import Stage


class MergingRanker(LoRARanker):
    """Base of models that merge the adapters their stages have trained."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
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
            "density": config["merge_density"],
            "residual": config["merge_residual"],
            "seed": config["seed"],
        }
        self.merge_report: dict[str, Any] = {}
        # asked now: after two trainings is late for a typing error
        self.method_source = inspect.getsource(sys.modules[resolve(self.method).__module__])
        if self.granularity not in ("global", "module"):
            raise ValueError(f"merge_granularity: {self.granularity} is neither global nor module")
        if self.split not in self.asked:
            raise ValueError(f"merge_split: {self.split} is not one of {', '.join(self.asked)}")

    # -- the merge stage -----------------------------------------------------------------------------------------------

    def merge_stage(self, name: str, sources: Mapping[str, Stage]) -> Stage:
        """A stage that merges the adapters of other stages; their names here are those of the report and of the table."""
        self.sources = dict(sources)
        depends = {
            "method": [self.method, self.method_source],  # a function of the user's changes as its file does
            "granularity": self.granularity,
            "prompts": [self.split, self.asked[self.split].fingerprint, self.prompt_count],
            "scores": [self.normalize, self.first_tokens],
            "settings": self.settings,
            "compress_rank": self.compress_rank,
        }
        return Stage(name, depends, self._mix, inputs=tuple(sources.values()))

    def finished(self, folder: Path) -> dict[str, Path]:
        self.merge_report = json.loads((folder / "merged" / "merge.json").read_text())
        return {"merged": folder / "merged"} | self._folders(self.sources)

    def _folders(self, stages: Mapping[str, Stage]) -> dict[str, Path]:
        return {name: self.cache.folder(stage) for name, stage in stages.items()}

    def _mix(self, out: Path, scratch: Path) -> None:
        folders = self._folders(self.sources)
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
        merge_adapters(folders, self.method, problem, out / "merged", split=self.split, compress_rank=self.compress_rank)

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
            return first_k_entropy(self.lm, prompts, self.first_tokens, self.pad_token_id, self.tokenizer.eos_token_id)

    def _valid_score(self, weights: Tensor) -> float:
        """Labelled validation score at weights [K] or [M, K]: what ``merge: grid`` maximises."""
        with mixture(self.lm, self._by_name(weights)):
            return self.asked["valid"].score()

    # -- controls ------------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        alone = super().controls()
        if self.method == "uniform":  # it would repeat the model's own row
            return alone
        return {"uniform mix": lambda: self.answer_with_mean(self.sources), **alone}

    @contextlib.contextmanager
    def answer_with_mean(self, adapters: Iterable[str]) -> Iterator[None]:
        """Let the uniform mixture of some adapters answer within a block."""
        share = torch.tensor(1 / len(list(adapters)))
        with mixture(self.lm, dict.fromkeys(adapters, share)), self._answering(self._identity(adapters)):
            yield

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, folder: Path) -> list[str]:
        """Draw the coefficients, where modules have their own: ``coefficients.png``, layers down, modules across."""
        weights = self.merge_report["weights"]
        if not isinstance(next(iter(weights.values())), dict):
            return []
        places = {module: _place(module) for module in weights}
        layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places.values(), strict=True))
        names = list(dict.fromkeys(name for row in weights.values() for name in row))
        values = np.full((len(layers), len(names) * len(kinds)), np.nan)
        for module, (layer, kind) in places.items():
            for name, weight in weights[module].items():
                values[layers.index(layer), names.index(name) * len(kinds) + kinds.index(kind)] = weight
        file = folder / "coefficients.png"
        heat_map(
            file,
            values,
            rows=layers,
            columns=[f"{name}: {kind}" for name in names for kind in kinds],
            title=f"Coefficients by module, merge: {self.method}",
            row_label="layer",
            column_label="adapter: module",
        )
        return [f"coefficients by module: {file}"]


def _place(module: str) -> tuple[str, str]:
    """Layer and kind of a module: ``model.layers.3.self_attn.q_proj`` -> 3, q_proj."""
    match = re.search(r"\.(\d+)\.(.+)$", module)
    return (match[1], match[2].rsplit(".", 1)[-1]) if match else ("", module)
