"""The curve of RecBole's trainers, in place of the TensorBoard files that they write wherever they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from recbole.trainer import trainer as recboles

from recbole_llm.store import curves


class TrainerCurve:
    """What RecBole's trainers take for a TensorBoard writer: records the loss of an epoch, as their log has it, and its score."""

    def add_scalar(self, tag: str, value: float, epoch: int) -> None:
        """Add a point; RecBole's tags are ``Loss/Train``, with a number if a loss has parts, and ``Vaild_score``."""
        if tag.startswith("Loss/Train"):
            curves.record(" ".join(filter(None, ("loss", tag.removeprefix("Loss/Train")))), epoch, float(value), "epoch")
        else:
            curves.record_valid(epoch, float(value), "epoch")

    def add_hparams(self, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Do nothing: the run record has all settings and results."""


class _NoWandb:
    """What they take for their own logger of W&B, which ``report_to`` takes the place of."""

    def __init__(self, config: Any):
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    log_eval_metrics = log_metrics


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Within the block, a trainer of RecBole that is built gets a :class:`TrainerCurve`, and no writers of its own."""
    before = recboles.get_tensorboard, recboles.WandbLogger
    recboles.get_tensorboard, recboles.WandbLogger = (lambda _: TrainerCurve()), _NoWandb
    try:
        yield
    finally:
        recboles.get_tensorboard, recboles.WandbLogger = before
