"""The training loop of all stages: bit-exact resuming, steps in parts, clipping and early stopping.

A step is a function of its index, the weights and the random state alone. So a killed run resumes from its last checkpoint and
ends, on CPU, with exactly the weights of an uninterrupted run. The times of checkpoints do not affect the result.

The parts of a step are dealt out to the processes of the run, and their gradients added, so that a step is that of one process
but for rounding and dropout, which each part draws from a seed of its own. Process 0 writes the checkpoints, which have the state
of all: any number of processes resumes from them.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_llm.settings import Settings
from recbole_llm.store import curves, files
from recbole_llm.store.processes import current
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.random_state import preserved_random_state, restore_rng, rng_state
from recbole_llm.store.stages import count_trained
from recbole_llm.training.saving import next_save, optimizer_tensors, restore_optimizer

logger = getLogger()

Part = Callable[[], Tensor]
"""Computes a part of the loss of a step, a scalar."""


def weighted(share: float, loss: Callable[..., Tensor], *arguments: Any) -> Part:
    """The part ``share * loss(*arguments)``."""
    return lambda: share * loss(*arguments)


@dataclass(frozen=True)
class Epochs:
    """The samples of each step, in an order drawn from (seed, epoch), so that training can resume at any step.

    Args:
        count: number of samples; an incomplete last batch is dropped.
        batch_size: samples per step; at most ``count``.
    """

    count: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.count // min(self.batch_size, self.count)

    def __getitem__(self, step: int) -> np.ndarray:
        """Indices of the samples of a step."""
        epoch, place = divmod(step, self.steps)
        size = min(self.batch_size, self.count)
        return _order(self.count, self.seed, epoch)[place * size : (place + 1) * size]


@lru_cache(maxsize=2)  # consecutive steps need the same order
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class LoopOptions(Settings):
    """Options that no fingerprint contains, since they concern how a training is computed and not what is trained.

    Args:
        save_every: minimum number of seconds between two checkpoints; 0 saves after every step.
        show_progress: show a progress bar.
        batch_tokens: padded tokens of an LM's forward and backward pass; None chooses them from the memory there is. They
            change the rounding of a gradient and which inputs the LoRA dropout drops, as another device does.
        gradient_checkpointing: compute an LM's layers again in the backward pass; ``auto``: above 1 B weights.
        max_memory: bytes of each device that this process may take, as in ``transformers``.
    """

    KEYS = {"save_every": "save_every_seconds", "batch_tokens": "train_batch_tokens"}

    save_every: float = 20.0
    show_progress: bool = True
    batch_tokens: int | None = None
    gradient_checkpointing: bool | str = "auto"
    max_memory: Mapping[Any, int | str] | None = None

    def __post_init__(self) -> None:
        if self.gradient_checkpointing not in (True, False, "auto"):
            raise ValueError(f"gradient_checkpointing: {self.gradient_checkpointing!r} is unknown; choose True, False or auto")


DEFAULT_OPTIONS = LoopOptions()


@dataclass
class LoopState:
    """Progress of a loop."""

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    checks_without_gain: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last point of the curve


@dataclass
class TrainingLoop:
    """Optimise named parameters for a number of steps.

    Args:
        name: stage name shown in the progress bar.
        parameters: the trainable tensors, by name; no other weights are saved.
        optimizer, scheduler: built over those parameters.
        loss: ``loss(s)`` yields parts whose sum is the loss of step ``s``. Each one is computed, with its backward pass, before
            the next one is asked for, so that there is one graph at a time. Of several processes, each computes some; with fewer
            parts than processes, some are idle. What ``loss`` itself draws, all processes draw alike.
        total_steps: optimiser steps.
        clip_grad_norm: largest gradient norm, or None.
        validate: returns a score (higher is better); called every ``eval_every`` steps and after the last one. The final weights
            are those of the best validation, also with patience 0.
        patience: validations without improvement before training stops; 0 disables early stopping.
        folder: folder for checkpoints; None disables them.
        options: see :class:`LoopOptions`.
        learning_rate_key: the key that the error names if training diverges.
        score_name: what the curve calls the validation score; None: ``valid_metric``.
        trained_before: prefixes of the names of parameters that an earlier stage has trained, and counted.
        loss_scale: factor of the loss in backward passes; the gradients of the parameters are divided by it.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Iterable[Part]]
    total_steps: int
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_grad_norm: float | None = 1.0
    validate: Callable[[], float] | None = None
    eval_every: int = 0
    patience: int = 0
    folder: Path | None = None
    options: LoopOptions = DEFAULT_OPTIONS
    learning_rate_key: str = "learning_rate"
    score_name: str | None = None
    trained_before: tuple[str, ...] = ()
    loss_scale: float = 1.0
    state: LoopState = field(default_factory=LoopState)
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> LoopState:
        """Train or resume training to the end; the parameters then have the best or the last weights."""
        count_trained(weights for name, weights in self.parameters.items() if not name.startswith(self.trained_before))
        self._resume()
        current().equalise(self.parameters.values())
        due = time.monotonic() + self.options.save_every
        with progress_bar(self.name, self.total_steps, start=self.state.step, show=self.options.show_progress) as bar:
            while self.state.step < self.total_steps and not self._stopped():
                bar.advance(loss=(loss := self._step()))
                self._record(loss.item())
                self._validate()
                if self.folder is not None and current().main and (began := time.monotonic()) >= due:
                    self._save(self.folder)
                    due = next_save(began, self.options.save_every)
        if self.best:
            self._load(self.best)
        return self.state

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        processes, total = current(), torch.zeros(())
        for number, part in enumerate(self.loss(self.state.step)):
            if processes.owns(number):
                with processes.randomness(self.name, self.state.step, number):
                    total = total + _backward(part, self.loss_scale)
        self._unscale()
        processes.add_gradients(self.parameters.values())
        total = processes.add(total)
        self._check_finite("loss", total.item())
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.state.step += 1
        return total

    def _unscale(self) -> None:
        """Divide the gradients by the scale of the loss.

        Raises:
            ValueError: a backward pass in float16 has overflowed.
        """
        found = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if self.loss_scale == 1 or not found:
            return
        torch._foreach_div_(found, self.loss_scale)
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            raise ValueError(f"{self.name}: a gradient overflows at step {self.state.step}; give dtype: bfloat16 or float32")

    def _record(self, loss: float) -> None:
        """Add the mean loss since the last point to the curve, where the next one is due."""
        losses = self.state.losses
        losses.append(loss)
        if curves.is_point(self.state.step, self.total_steps):
            curves.record("loss", self.state.step, math.fsum(losses) / len(losses))
            losses.clear()

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"{self.name}: the {what} is {value} at step {self.state.step}; lower `{self.learning_rate_key}`")

    def _validate(self) -> None:
        """Validate if it is due, and update the best weights."""
        due = self.state.step == self.total_steps or bool(self.eval_every and self.state.step % self.eval_every == 0)
        if self.validate is None or not due:
            return
        with preserved_random_state():
            score = current().agree(float(self.validate()))
        self._check_finite("validation score", score)
        self.state.validations.append({"step": self.state.step, "score": score})
        curves.record_valid(self.state.step, score, metric=self.score_name)
        if self.state.best_score is None or score > self.state.best_score:
            self.state.best_score, self.state.best_step = score, self.state.step
            self.state.checks_without_gain = 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            self.state.checks_without_gain += 1
        logger.info(f"{self.name}: step {self.state.step}, valid score {score:.4f} (best {self.state.best_score:.4f})")

    def _stopped(self) -> bool:
        return bool(self.patience) and self.state.checks_without_gain >= self.patience

    def _save(self, folder: Path) -> None:
        random_tensors, random_values = rng_state()
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": dict(self.parameters),
            "best": self.best,
            "optimizer": optimizer_tensors(self.optimizer),
            "rng": random_tensors,
        }
        tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
        current = folder / f"step-{self.state.step}"
        files.save_state(current, tensors, {"loop": asdict(self.state), "rng": random_values})
        for other in self._saves():
            if other != current:
                shutil.rmtree(other)

    def _saves(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder is not None else ()
        return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def _resume(self) -> None:
        """Resume from the newest sound checkpoint that process 0 sees."""
        sound = next((folder.name for folder in self._saves() if self._is_sound(folder)), None) if current().main else None
        name = current().agree(sound)
        if name is not None and self.folder is not None:
            self._restore(*files.load_state(self.folder / name))

    def _is_sound(self, folder: Path) -> bool:
        try:
            files.verify(folder)
        except files.DamagedError as error:
            logger.warning(f"{self.name}: {error}; not resumed from it")
            return False
        return True

    def _restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = tensor
        self._load(groups["weights"])
        device = next(iter(self.parameters.values())).device
        self.best = {name: tensor.to(device) for name, tensor in groups.get("best", {}).items()}
        restore_optimizer(self.optimizer, groups.get("optimizer", {}))
        self.state = LoopState(**values["loop"])
        if self.scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch expects optimiser steps in between
                for _ in range(self.state.step):
                    self.scheduler.step()  # depends on the step alone
        restore_rng(groups["rng"], values["rng"])
        logger.info(f"{self.name}: resuming from step {self.state.step} of {self.total_steps}")


def _backward(part: Part, scale: float) -> Tensor:
    """The value of a part, after the backward pass of ``scale`` times it; its graph is dropped."""
    loss = part()
    (loss if scale == 1 else loss * scale).backward()
    return loss.detach().cpu()


def validations(total_steps: int, eval_every: int) -> int:
    """How often a :class:`TrainingLoop` validates that does not stop early."""
    return -(-total_steps // eval_every) if eval_every else 1
