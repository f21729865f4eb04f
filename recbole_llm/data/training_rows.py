"""The training split as RecBole's sequential models read it: rows of a history and the item that followed it.

Legend: R rows, L longest history of a row, N training interactions, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TrainingRows:
    """The rows, with internal ids.

    Attributes:
        users: int [R].
        histories: int [R, L], oldest first, padded on the right with 0.
        lengths: int [R], of the histories.
        targets: int [R], the items that followed.
        history_times, target_times: of these, [R, L] and [R]; None if the dataset has no times.
    """

    users: np.ndarray
    histories: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    history_times: np.ndarray | None
    target_times: np.ndarray | None

    @classmethod
    def of(cls, dataset: Any) -> TrainingRows:
        """The rows of RecBole's training split; views of its tensors."""
        rows, config = dataset.inter_feat, dataset.config
        history = dataset.iid_field + config["LIST_SUFFIX"]
        fields = dataset.uid_field, history, config["ITEM_LIST_LENGTH_FIELD"], dataset.iid_field
        times = time_fields(config)
        timed = all(field in rows for field in times)
        return cls(*(rows[field].numpy() for field in fields), *(rows[field].numpy() if timed else None for field in times))

    @cached_property
    def _firsts(self) -> tuple[np.ndarray, np.ndarray]:
        """The row with the shortest history of each user, and where it has an item, bool [users, L].

        RecBole's rows begin with a history of one item; rows of files that were split elsewhere may begin later.
        """
        order = np.lexsort((self.lengths, self.users))
        rows = order[np.unique(self.users[order], return_index=True)[1]]
        return rows, np.arange(self.histories.shape[1]) < self.lengths[rows, None]

    @cached_property
    def interactions(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Items [N] of the training interactions, each once, and their times [N], or None without times."""
        rows, known = self._firsts
        items = np.concatenate([self.histories[rows][known], self.targets])
        if self.history_times is None or self.target_times is None:
            return items, None
        return items, np.concatenate([self.history_times[rows][known], self.target_times])

    def transitions(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of items of which the second is ``steps`` interactions after the first, each pair of a user once: two int [M]."""
        rows, known = self._firsts
        far = self.lengths >= steps
        before, after = self.histories[rows][:, :-steps][known[:, steps:]], self.histories[rows][:, steps:][known[:, steps:]]
        last = self.histories[far, self.lengths[far] - steps]
        return np.concatenate([before, last]), np.concatenate([after, self.targets[far]])


def time_fields(config: Any) -> tuple[str, str]:
    """The columns of RecBole's rows with the times of the history and of the target."""
    field = str(config["TIME_FIELD"])
    return field + config["LIST_SUFFIX"], field
