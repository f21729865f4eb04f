"""Which items a full ranking leaves out: the history of each user, by the same rule for all models.

RecBole masks the history for general models but not for sequential ones, so their results in one table are not comparable. Here
the rule is the same for every model, unless ``mask_history: False`` keeps RecBole's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.utils import ModelType
from torch import Tensor

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories


@dataclass(frozen=True)
class Masking:
    """For which models a full ranking leaves out the history.

    Attributes:
        sequential, general: whether the history is masked for RecBole's sequential models and our rankers and encoders, and for
            all other models.
        because: why it is not masked for every model; None if it is.
    """

    sequential: bool = True
    general: bool = True
    because: str | None = None

    @classmethod
    def of(cls, config: Any, *, repeats_kept: bool) -> Masking:
        """The rule of a configuration.

        Args:
            repeats_kept: users choose items again in this data, so the target itself may be in the history.
        """
        if repeats_kept:
            return cls(False, False, "repeated interactions are kept (rm_dup_inter)")
        if not config["mask_history"]:
            return cls(False, True, "mask_history: False")
        return cls()

    def masks(self, model_type: ModelType) -> bool:
        """Whether the history is masked for models of RecBole's type."""
        return self.sequential if model_type == ModelType.SEQUENTIAL else self.general

    def check(self, config: Any) -> None:
        """Refuse ``mask_history: True`` from the user where repeats are kept.

        Raises:
            ValueError: names the keys to change.
        """
        if not self.general and config.external_config_dict.get("mask_history"):
            raise ValueError(
                f"mask_history: True, but users of {config['dataset']} choose items again and rm_dup_inter keeps that: a masked "
                "history would contain targets. Remove mask_history, so that nothing is masked for any model, or drop the "
                "repeats with rm_dup_inter: first"
            )

    def __str__(self) -> str:
        if self.because is None:
            return "history masked"
        return f"history {'masked for general models alone' if self.general else 'not masked'}: {self.because}"


@dataclass(frozen=True)
class KnownItems:
    """The whole history of every row of an evaluation split, even if a model reads only its most recent items.

    It ends before the first target of the row: a row has all targets of a user, or one of them for a sequential model.
    """

    histories: Histories

    def of(self, users: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and items [H] of the history of ``users`` [B], whose targets [T] are in ``rows`` [T]."""
        items = [self.histories.items[user] for user in users.tolist()]
        ends = [len(whole) for whole in items]
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            ends[row] = min(ends[row], int(np.flatnonzero(items[row] == target)[0]))
        history = np.concatenate([np.empty(0, dtype=np.int64), *(whole[:end] for whole, end in zip(items, ends, strict=True))])
        return torch.arange(len(items)).repeat_interleave(torch.tensor(ends, dtype=torch.long)), torch.from_numpy(history)
