"""The learning rate of a training by step, from ``transformers``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any, ClassVar

from recbole_llm.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = getLogger()

KINDS = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Schedule(Settings):
    """A warm-up from 0, then what ``kind`` says: a decay to 0, or a constant rate.

    Attributes:
        kind: a ``lr_scheduler_type`` of ``transformers``; ``constant`` has no warm-up.
        warmup_ratio: share of the steps with rising rate, rounded up, but not all of them.
        warmup_steps: their number instead.
    """

    KEYS: ClassVar[Mapping[str, str]] = {"kind": "lr_scheduler_type"}

    kind: str = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"lr_scheduler_type: {self.kind!r} is unknown; choose {', '.join(KINDS)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: {self.warmup_ratio} is not a share between 0 and 1; give warmup_steps for a number")

    def build(self, optimizer: Any, total_steps: int) -> Any:
        """The scheduler of an optimiser for a training of so many steps."""
        from transformers import get_scheduler

        warmup = self.warmup_steps
        if warmup is None:  # a share leaves a step at least, since the first one of a warm-up has rate 0
            warmup = min(math.ceil(total_steps * self.warmup_ratio), total_steps - 1)
        if self.kind != "constant" and warmup >= total_steps:
            logger.warning(
                f"warmup_steps: {warmup} steps of rising learning rate are no fewer than the {total_steps} of the training, "
                "which ends below its learning rate; give fewer, or more epochs or samples"
            )
        return get_scheduler(self.kind, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
