"""What the trainers of ``train_mode: sequence`` share: epochs over windows, warm-up of the learning rate, averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recbole_llm.classical.shared import SharedTraining
from recbole_llm.classical.windows import WindowLoader
from recbole_llm.settings import Settings


@dataclass(frozen=True)
class Steadying(Settings):
    """Settings of :class:`SteadyTraining`."""

    sequence_warmup_steps: int = 0
    sequence_ema_decay: float | None = None


class SteadyTraining(SharedTraining):
    """Mixin before RecBole's ``Trainer``: epochs of :meth:`batches`, ``sequence_warmup_steps`` and ``sequence_ema_decay``.

    The averaged weights are validated, saved and tested; the optimiser goes on with its own. A checkpoint has both.
    """

    config: Any
    model: Any
    optimizer: Any
    training_state: dict[str, Any]
    _batches: tuple[WindowLoader, Callable] | None = None

    def __init__(self, config: Any, model: Any):
        super().__init__(config, model)
        settings = Steadying.of(config)
        steps, decay = settings.sequence_warmup_steps, settings.sequence_ema_decay
        self._schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / steps)) if steps else None
        self._average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.optimizer.register_step_post_hook(self._after_step)

    @classmethod
    def batches(cls, config: Any, model: Any, train_data: Any) -> tuple[WindowLoader, Callable]:
        """The batches of an epoch, and the loss of each."""
        raise NotImplementedError

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Callable | None = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        if self._batches is None:
            self._batches = self.batches(self.config, self.model, train_data)
        loader, loss = self._batches
        loader.epoch = epoch_idx
        return super()._train_epoch(loader, epoch_idx, loss_func or loss, show_progress)

    def _after_step(self, *_: Any) -> None:
        if self._schedule is not None:
            self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self.model)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, if there are any, within a ``with`` block."""
        if self._average is None:
            yield
            return
        own = _copy(self.model)
        self.model.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        with self.averaged():
            return super()._valid_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        state: dict[str, Any] = {}
        if self._average is not None:
            state |= {"weights": _copy(self.model), "averaged": int(self._average.n_averaged)}
        if self._schedule is not None:
            state["schedule"] = self._schedule.state_dict()
        self.training_state = state
        with self.averaged():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def resume_checkpoint(self, resume_file: str) -> None:
        """Resume the averaged weights, the optimiser's own, and the warm-up."""
        super().resume_checkpoint(resume_file)  # type: ignore[misc]
        state = self.training_state
        if self._average is not None and "weights" in state:
            self._average.module.load_state_dict(self.model.state_dict())
            self._average.n_averaged.fill_(state["averaged"])
            self.model.load_state_dict(state["weights"])
        if self._schedule is not None and "schedule" in state:
            self._schedule.load_state_dict(state["schedule"])


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.detach().clone() for name, values in model.state_dict().items()}
