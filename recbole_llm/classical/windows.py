"""Windows over whole training histories, and the batches of an epoch.

A window is a row of at most ``MAX_ITEM_LIST_LENGTH`` consecutive items of a history. RecBole's training split has one row a
prefix; the histories are restored from it, so windows have the same (prefix, next item) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.data.sequences import last_items

if TYPE_CHECKING:
    from recbole.data.dataset import SequentialDataset
    from recbole.data.interaction import Interaction


class Windows(NamedTuple):
    """Rows of consecutive items: ``items[n, : j + 1]`` predict ``targets[n, j]``."""

    items: Tensor
    """``[N, L]``, padded on the right with 0."""
    lengths: Tensor
    """``[N]``"""
    targets: Tensor
    """``[N, L]``, 0 if there is no target or it belongs to another window."""


def windows(histories: Sequence[Tensor], max_len: int) -> Windows:
    """Cut histories (item ids in time order, ``[n]`` each) into windows; every next item is a target exactly once.

    A history of n items has n - 1 targets and ``ceil((n - 1) / max_len)`` windows, the fewest possible. The first window
    has the first ``max_len`` targets. The others share the remaining targets evenly and begin early enough to be full,
    which maximises the shortest context of a target.

    Raises:
        ValueError: no history has two items.
    """
    rows, targets, lengths = [], [], []
    for history in histories:
        done = 0
        for end in window_ends(len(history) - 1, max_len):
            start = max(end - max_len, 0)
            fresh = history[start + 1 : end + 1].clone()
            fresh[: done - start] = 0
            blank = max_len - (end - start)
            rows.append(pad(history[start:end], (0, blank)))
            targets.append(pad(fresh, (0, blank)))
            lengths.append(end - start)
            done = end
    if not rows:
        raise ValueError(
            "train_mode: sequence needs a user with two training interactions, but none has them. Lower the filters "
            "(user_inter_num_interval, item_inter_num_interval), or give a dataset of longer histories."
        )
    return Windows(torch.stack(rows), torch.tensor(lengths), torch.stack(targets))


def window_ends(count: int, max_len: int) -> list[int]:
    """Ends of the windows over ``count`` targets: ``max_len``, then evenly spaced up to ``count``."""
    others = -(-count // max_len) - 1
    if others < 1:
        return [count] if count > 0 else []
    return [max_len + (count - max_len) * k // others for k in range(others + 1)]


def training_histories(dataset: SequentialDataset) -> list[Tensor]:
    """Every user's training items in time order, restored from the rows of RecBole's augmented training split.

    Raises:
        ValueError: rows of a user's history are missing (files that were split elsewhere).
    """
    rows = dataset.inter_feat
    order = torch.sort(rows[dataset.uid_field], stable=True).indices  # [R]
    users = rows[dataset.uid_field][order]
    targets = rows[dataset.iid_field][order]
    lengths = rows[dataset.item_list_length_field][order]
    before = last_items(rows[order], dataset.item_id_list_field, lengths)  # [R]
    first = torch.ones_like(users, dtype=torch.bool)
    first[1:] = users[1:] != users[:-1]
    follows = torch.where(first, lengths == 1, before == targets.roll(1))  # [R]
    if not follows.all():
        user = str(dataset.id2token(dataset.uid_field, users[~follows][0].item()))
        raise ValueError(
            f"train_mode: sequence needs the whole training history of each user, but rows of user {user!r} are "
            "missing or out of order (benchmark_filename?). Use train_mode: prefix."
        )
    counts = torch.unique_consecutive(users, return_counts=True)[1].tolist()
    return [torch.cat([start[None], items]) for start, items in zip(before[first], targets.split(counts), strict=True)]


class WindowLoader:
    """Batches of windows in an order drawn from ``(seed, epoch)``, or without ``shuffle`` in theirs; ``_batch`` makes one."""

    _batch: Callable[[Tensor, torch.Generator], Interaction]

    def __init__(self, count: int, windows_per_batch: float, seed: int, *, shuffle: bool = True):
        self._count, self._seed, self._shuffle, self.epoch = count, seed, shuffle, 0
        self.batch_size = max(1, round(windows_per_batch))

    def __len__(self) -> int:
        return -(-self._count // self.batch_size)

    def __iter__(self) -> Iterator[Interaction]:
        own = np.random.SeedSequence([self._seed, self.epoch]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(own))
        order = torch.randperm(self._count, generator=generator) if self._shuffle else torch.arange(self._count)
        for rows in order.split(self.batch_size):
            yield self._batch(rows, generator)
