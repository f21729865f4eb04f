"""Which items a full ranking leaves out: the history of each user, by the same rule for all models.

RecBole masks the history for general models and not for sequential ones, so that one table would rank with and without the seen
items. The rule here is the same for every model, unless ``mask_history: False`` keeps RecBole's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType
from torch import Tensor

Pairs = tuple[np.ndarray, np.ndarray]
"""Internal ids of users and items of interactions, both [R]."""


def pairs(dataset: Any) -> Pairs:
    """The interactions of a RecBole dataset, in the order of its table."""
    users, items = (np.asarray(dataset.inter_feat[field]).astype(np.int64) for field in (dataset.uid_field, dataset.iid_field))
    return users, items


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
            repeats_kept: users choose items again in this data, so the target itself may stand in the history.
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


class Grouped:
    """Interactions by user, each user's in the given order.

    Args:
        pairs: users and items [R].
        users, items: numbers of users and items, padding included.
    """

    def __init__(self, pairs: Pairs, users: int, items: int):
        order = np.argsort(pairs[0], kind="stable")  # [R]
        self._users, self._items, self._catalogue = pairs[0][order], pairs[1][order], items
        self.counts = np.bincount(self._users, minlength=users)  # [U]
        self._starts = np.cumsum(self.counts) - self.counts  # [U]

    def first(self, users: np.ndarray, counts: np.ndarray) -> Pairs:
        """Rows and items [H]: the first ``counts`` [B] interactions of ``users`` [B]."""
        rows = np.repeat(np.arange(len(users)), counts)  # [H]
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # [H], in the row
        return rows, self._items[self._starts[users][rows] + place]

    def places(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The place [T] of each interaction ``users`` [T], ``items`` [T] in its user's."""
        keys, order = self._keys
        found = order[np.searchsorted(keys, users * self._catalogue + items)]  # [T]
        return found - self._starts[users]

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        keys = self._users * self._catalogue + self._items  # [R]
        order = np.argsort(keys, kind="stable")
        return keys[order], order


@dataclass(frozen=True)
class KnownItems:
    """The history of every row of an evaluation split: the whole one, also where a model reads its most recent items alone.

    It consists of the user's interactions in earlier splits and, where a sequential model has a row for each of several targets,
    of those before the row's target.

    Attributes:
        earlier: interactions in earlier splits.
        own: interactions of this split in its order.
    """

    earlier: Grouped
    own: Grouped

    @classmethod
    def before(cls, whole: Pairs, split: Pairs, *later: Pairs, users: int, items: int) -> KnownItems:
        """What is known before a split.

        Args:
            whole: all interactions, none of them repeated.
            split, later: those of the split and of later ones.
            users, items: numbers of users and items, padding included.
        """
        known, *others = (own[0] * items + own[1] for own in (whole, split, *later))
        keys = np.setdiff1d(known, np.concatenate(others))  # sorted, so by user
        return cls(Grouped((keys // items, keys % items), users, items), Grouped(split, users, items))

    def of(self, users: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and items [H] of the history of ``users`` [B], whose targets [T] are in ``rows`` [T]."""
        who, places = users.cpu().numpy(), rows.cpu().numpy()
        found = [self.earlier.first(who, self.earlier.counts[who])]
        before = self.own.counts[who]  # [B]
        if before.max(initial=0) > 1:
            np.minimum.at(before, places, self.own.places(who[places], targets.cpu().numpy()))
            found.append(self.own.first(who, before))
        history, items = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
        return history, items
