"""RecBole's leave-one-out with arrays in place of Python lists; its rows are the same, in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ArrayGroups:
    """Mixin for a RecBole dataset class."""

    def _grouped_index(self, group_by_list: np.ndarray) -> list[np.ndarray]:
        """The rows of each user, in the order of the users' first rows."""
        keys = np.asarray(group_by_list)
        order = np.argsort(keys, kind="stable")  # [R]
        ranked = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # [G]
        groups = np.split(order, starts[1:])
        return [groups[group] for group in np.argsort(order[starts])]

    def _split_index_by_leave_one_out(self, grouped_index: Sequence[np.ndarray], leave_one_num: int) -> list[np.ndarray]:
        """All rows of each user but the last ones; then its last one but ``leave_one_num`` - 1, and so on to its last one.

        The first row of a user remains in the first part.
        """
        lengths, rows = np.array([len(group) for group in grouped_index]), np.concatenate(grouped_index)  # [G], [R]
        from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows)) - 1  # [R], 0 for a user's last row
        held_out = from_end < np.repeat(np.minimum(leave_one_num, lengths - 1), lengths)  # [R]
        part = np.where(held_out, leave_one_num - from_end, 0)  # [R]
        return [rows[part == number] for number in range(leave_one_num + 1)]
