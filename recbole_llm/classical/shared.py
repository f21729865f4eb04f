"""RecBole's trainer in several processes: each computes its rows of every batch, and the gradients are added.

RecBole's own launcher needs NCCL, and averages the gradients of processes whatever their numbers of targets. Here the loss that
its trainer is given runs the backward pass itself, so clipping and the optimiser read the gradients of the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recbole_llm.store.processes import Processes, current


class SharedTraining:
    """Mixin before RecBole's ``Trainer``, for a loss that is a mean over the targets of a batch."""

    model: Any
    own_randomness = True  # each process draws its own dropout; False: all draw alike, for a loss that draws for the whole batch
    _batch = 0

    def __init__(self, config: Any, model: Any):
        super().__init__(config, model)  # type: ignore[call-arg]
        for key in ("enable_amp", "enable_scaler"):
            if current().size > 1 and config[key]:
                raise ValueError(f"{key}: {config[key]} needs one process; remove it, or start the run without a launcher")

    def targets_of(self, interaction: Any) -> Tensor:
        """The number of targets of each row [B] of a batch."""
        raise NotImplementedError

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Callable | None = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        processes, loss = current(), loss_func or self.model.calculate_loss
        if processes.size > 1:
            if not self._batch:
                processes.equalise(self.model.state_dict().values())
            whole = loss
            loss = lambda interaction: self._shared(processes, whole, interaction)  # noqa: E731
        return super()._train_epoch(train_data, epoch_idx, loss, show_progress)  # type: ignore[misc]

    def _shared(self, processes: Processes, loss: Callable, interaction: Any) -> Tensor:
        """The loss of a batch, whose backward pass is done: that of the result changes no parameter."""
        targets = self.targets_of(interaction)  # [B]
        own = torch.arange(processes.rank, len(targets), processes.size)  # rows that this process has
        share = targets[own].sum() / targets.sum()
        if not share:  # a batch of few targets: the draws are made all the same
            own = targets.argmax().reshape(1)
        self._batch += 1
        randomness = processes.randomness(self._batch, processes.rank) if self.own_randomness else contextlib.nullcontext()
        with randomness:
            part = share * loss(interaction[own])
            part.backward()
        processes.add_gradients(self.model.parameters())
        return processes.add(part).requires_grad_()


class SharedPairs(SharedTraining):
    """Mixin for a model whose loss is a mean over (user, item) pairs."""

    own_randomness = False  # the sampled items are those of the whole batch

    def targets_of(self, interaction: Any) -> Tensor:
        return torch.ones(len(interaction), device=interaction[self.model.USER_ID].device)


def check_shared(trainer: Any, name: str) -> None:
    """Refuse several processes for a model that is trained by a loop of RecBole's own.

    Raises:
        ValueError: names the model and those of several processes.
    """
    size = current().size
    if size > 1 and not trainer.recommender.trained_in_stages and not isinstance(trainer, SharedTraining):
        raise ValueError(
            f"--model={name}: RecBole's own loop trains it in one process, not in {size}; start the run without a launcher. "
            "Several processes train the LLM models, and RecBole's sequential models in train_mode: sequence"
        )
