"""The training split as RecBole's sequential models read it: rows of a history and the item that followed it.

Legend: R rows, L longest history of a row, N training interactions, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

_BLOCK = 500_000  # rows whose histories are in memory at once


class TrainingRows:
    """The interactions and transitions of RecBole's training split, in internal ids.

    Args:
        dataset: RecBole's training split for sequential models.
    """

    def __init__(self, dataset: Any):
        self._rows, config = dataset.inter_feat, dataset.config
        self._user, self._item, self._length = dataset.uid_field, dataset.iid_field, config["ITEM_LIST_LENGTH_FIELD"]
        self._history = dataset.iid_field + config["LIST_SUFFIX"]
        self._history_time, self._time = time_fields(config)

    @cached_property
    def interactions(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Items [N] of the training interactions, each once, and their times [N], or None without times."""
        first = self._firsts
        known = _known(first[self._history], first[self._length])
        items = np.concatenate([first[self._history].numpy()[known], self._rows[self._item].numpy()])
        if self._time not in self._rows or self._history_time not in self._rows:
            return items, None
        return items, np.concatenate([first[self._history_time].numpy()[known], self._rows[self._time].numpy()])

    def transitions(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Pairs of items of which the second is up to ``most`` interactions after the first, each pair of a user once.

        Yields:
            The first and the second items and the steps between them, of many pairs, all int [M].
        """
        histories, lengths = self._firsts[self._history].numpy(), self._firsts[self._length]
        known = _known(histories, lengths)
        yield _joined(
            (histories[:, :-steps][known[:, steps:]], histories[:, steps:][known[:, steps:]], steps)
            for steps in range(1, min(most, histories.shape[1] - 1) + 1)
        )
        for start in range(0, len(self._rows), _BLOCK):
            rows = self._rows[start : start + _BLOCK]
            histories, lengths, targets = (rows[name].numpy() for name in (self._history, self._length, self._item))
            far = [lengths >= steps for steps in range(1, min(most, histories.shape[1]) + 1)]
            yield _joined(
                (histories[rows, lengths[rows] - steps], targets[rows], steps) for steps, rows in enumerate(far, start=1)
            )

    @cached_property
    def _firsts(self) -> Any:
        """The row with the shortest history of each user, whose items are not targets themselves.

        RecBole's rows begin with a history of one item; those of files that were split elsewhere may begin later.
        """
        users, lengths = (self._rows[name].numpy() for name in (self._user, self._length))
        order = np.lexsort((lengths, users))
        return self._rows[order[np.unique(users[order], return_index=True)[1]]]


def _joined(pairs: Iterable[tuple[np.ndarray, np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    none = np.empty(0, dtype=np.int64)
    parts = [(before, after, np.full(len(before), steps)) for before, after, steps in pairs]
    before, after, steps = (np.concatenate(part) for part in zip((none, none, none), *parts, strict=True))
    return before, after, steps


def _known(histories: Any, lengths: Any) -> np.ndarray:
    """Where histories [R, L] of lengths [R] have an item: bool [R, L]."""
    return np.arange(histories.shape[1]) < lengths.numpy()[:, None]


def time_fields(config: Any) -> tuple[str, str]:
    """The columns of RecBole's rows with the times of the history and of the target."""
    field = str(config["TIME_FIELD"])
    return field + config["LIST_SUFFIX"], field
