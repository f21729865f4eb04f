"""One training loop for all that stages train: resumable to the bit, with accumulation, clipping and early stopping.

A step is a function of its index, the weights and the random state alone, so a killed run goes on from its last
checkpoint and ends, on CPU, with exactly the weights of a run that was not killed. Saving only observes: when it
happens (by the clock) changes nothing.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_llm.settings import Settings
from recbole_llm.store import files
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.stages import count_trained

logger = getLogger()


@dataclass(frozen=True)
class Epochs:
    """Which samples a step takes: every epoch in an order drawn from (seed, epoch), so that training can resume anywhere.

    Args:
        count: samples; a rest that fills no batch is left out of an epoch.
        batch_size: samples of a step; at most all of them.
    """

    count: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.count // min(self.batch_size, self.count)

    def __getitem__(self, step: int) -> np.ndarray:
        """Indices of the samples of a step."""
        epoch, place = divmod(step, self.steps)
        size = min(self.batch_size, self.count)
        return _order(self.count, self.seed, epoch)[place * size : (place + 1) * size]


@lru_cache(maxsize=2)  # a step asks for the order that the step before it has asked for
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class LoopOptions(Settings):
    """How a training is saved and shown, which changes nothing of its result.

    Args:
        save_every: seconds between two saves; 0 saves after every step.
        show_progress: show a progress bar.
    """

    KEYS = {"save_every": "save_every_seconds"}

    save_every: float = 20.0
    show_progress: bool = True


DEFAULT_OPTIONS = LoopOptions()


@dataclass
class LoopState:
    """Where a loop stands."""

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    checks_without_gain: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)


@dataclass
class TrainingLoop:
    """Optimise named parameters for a number of steps.

    Args:
        name: stage name shown in the progress bar.
        parameters: the trainable tensors, by name; nothing else is saved.
        optimizer, scheduler: built over those parameters.
        loss: ``loss(i)`` returns the scalar loss of micro-batch ``i``; step ``s`` takes micro-batches
            ``s * accumulate ... (s + 1) * accumulate - 1`` and averages them.
        total_steps: optimiser steps.
        accumulate: micro-batches per optimiser step.
        clip_grad_norm: largest gradient norm, or None.
        validate: returns a score (bigger is better); asked every ``eval_every`` steps and after the last one.
        patience: validations without a gain after which training stops; 0 never stops early. Where ``validate`` is
            given, the weights of the best validation are kept, also with patience 0.
        folder: where the state of an unfinished loop is kept; None keeps nothing.
        options: how it is saved and shown.
        learning_rate_key: what the user would lower, named where training diverges.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    total_steps: int
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = 1.0
    validate: Callable[[], float] | None = None
    eval_every: int = 0
    patience: int = 0
    folder: Path | None = None
    options: LoopOptions = DEFAULT_OPTIONS
    learning_rate_key: str = "learning_rate"
    state: LoopState = field(default_factory=LoopState)
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> LoopState:
        """Train (or go on training) to the end; the parameters then hold the best or the last weights."""
        count_trained(self.parameters.values())
        self._resume()
        saved = time.monotonic()
        with progress_bar(self.name, self.total_steps, start=self.state.step, show=self.options.show_progress) as bar:
            while self.state.step < self.total_steps and not self._stopped():
                loss = self._step()
                bar.advance(loss=loss)
                if self._validation_due():
                    self._validate()
                if self.folder is not None and time.monotonic() - saved > self.options.save_every:
                    self._save()
                    saved = time.monotonic()
        if self.best:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])
        return self.state

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for micro in range(self.state.step * self.accumulate, (self.state.step + 1) * self.accumulate):
            loss = self.loss(micro) / self.accumulate
            loss.backward()
            total = total + loss.detach().cpu()
        self._check_finite("loss", total.item())
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.state.step += 1
        return total

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"{self.name}: the {what} is {value} at step {self.state.step}; lower `{self.learning_rate_key}`")

    # -- early stopping ------------------------------------------------------------------------------------------------

    def _validation_due(self) -> bool:
        if self.validate is None:
            return False
        return self.state.step == self.total_steps or bool(self.eval_every and self.state.step % self.eval_every == 0)

    def _validate(self) -> None:
        assert self.validate is not None
        random_state = files.rng_state()
        score = self.validate()
        files.restore_rng(*random_state)  # looking must not change what follows
        self._check_finite("validation score", score)
        self.state.validations.append({"step": self.state.step, "score": score})
        if self.state.best_score is None or score > self.state.best_score:
            self.state.best_score, self.state.best_step = score, self.state.step
            self.state.checks_without_gain = 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            self.state.checks_without_gain += 1
        logger.info(f"{self.name}: step {self.state.step}, valid score {score:.4f} (best {self.state.best_score:.4f})")

    def _stopped(self) -> bool:
        return bool(self.patience) and self.state.checks_without_gain >= self.patience

    # -- resume --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.folder is not None
        random_tensors, random_values = files.rng_state()
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": dict(self.parameters),
            "best": self.best,
            "optimizer": files.optimizer_tensors(self.optimizer),
            "rng": random_tensors,
        }
        tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
        values: dict[str, Any] = {"loop": asdict(self.state), "rng": random_values}
        files.save_state(self.folder / f"step-{self.state.step}", tensors, values)
        for other in self._saves():
            if other.name != f"step-{self.state.step}":
                shutil.rmtree(other)

    def _saves(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def _resume(self) -> None:
        for folder in self._saves():
            try:
                tensors, values = files.load_state(folder)
            except files.DamagedError as error:
                logger.warning(f"{self.name}: {error}; not resumed from it")
                continue
            groups: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                group, key = name.split("/", 1)
                groups.setdefault(group, {})[key] = tensor
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(groups["weights"][name])
            device = next(iter(self.parameters.values())).device
            self.best = {name: tensor.to(device) for name, tensor in groups.get("best", {}).items()}
            files.restore_optimizer(self.optimizer, groups.get("optimizer", {}))
            self.state = LoopState(**values["loop"])
            if self.scheduler is not None:
                self._forward_scheduler()
            files.restore_rng(groups["rng"], values["rng"])
            logger.info(f"{self.name}: resuming from step {self.state.step} of {self.total_steps}")
            return

    def _forward_scheduler(self) -> None:
        """Bring a schedule that depends on the step alone to the step at which training goes on."""
        assert self.scheduler is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's steps, which the killed process took
            for _ in range(self.state.step):
                self.scheduler.step()


def cosine_with_warmup(optimizer: torch.optim.Optimizer, total_steps: int, warmup_ratio: float) -> Any:
    """Linear warm-up, then a cosine to zero: the schedule of the RecCocktail recipe, from ``transformers``."""
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, int(np.ceil(total_steps * warmup_ratio)), total_steps)
