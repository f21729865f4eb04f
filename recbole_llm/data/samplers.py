"""RecBole's sampler of negatives with arrays in place of Python sets; its draws are the same.

RecBole keeps a set of items for each user and phase: three times 500,000 sets of 20 items are 3 GB. It looks up each drawn item
in Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.sampler import Sampler

PHASES = ("train", "valid", "test")


class UsedItems:
    """The items of each user, as RecBole's array of sets gives them.

    Args:
        codes: ``user * item_num + item``, sorted, each once.
    """

    def __init__(self, codes: np.ndarray, user_num: int, item_num: int) -> None:
        self._codes, self._item_num = codes, item_num
        self._starts = np.searchsorted(codes, np.arange(user_num + 1) * item_num)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, user: Any) -> Any:
        if user is None:  # RecBole's loader asks so before the first user
            return None
        if np.ndim(user):
            return [self[one] for one in user]
        start, end = self._starts[user], self._starts[user + 1]
        return set((self._codes[start:end] % self._item_num).tolist())

    @property
    def counts(self) -> np.ndarray:
        """Number of items of each user [U]."""
        return np.diff(self._starts)

    def contains(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each pair is used: BoolArray[N]."""
        codes = users.astype(np.int64) * self._item_num + items
        places = np.searchsorted(self._codes, codes).clip(max=max(0, len(self._codes) - 1))
        return self._codes[places] == codes if len(self._codes) else np.zeros(len(codes), dtype=bool)


class ArraySampler(Sampler):
    """RecBole's ``Sampler``."""

    def get_used_ids(self) -> dict[str, UsedItems]:
        """The items of each user up to and in each phase.

        Raises:
            ValueError: a user has all items, so there are no negatives.
        """
        found, codes = {}, np.empty(0, dtype=np.int64)
        for phase, dataset in zip(self.phases, self.datasets, strict=True):
            users, items = (dataset.inter_feat[field].numpy().astype(np.int64) for field in (self.uid_field, self.iid_field))
            codes = np.sort(np.concatenate([codes, users * self.item_num + items]))  # np.union1d hashes, which is slower
            codes = codes[np.diff(codes, prepend=-1) > 0]
            found[phase] = UsedItems(codes, self.user_num, self.item_num)
        full = found[self.phases[-1]].counts + 1 == self.item_num
        if full.any():
            user = str(self.datasets[0].id2token(self.uid_field, int(full.argmax())))
            raise ValueError(
                f"train_neg_sample_args: user {user!r} has all {self.item_num - 1} items, so there are no negatives to draw; "
                "remove such users with user_inter_num_interval"
            )
        return found

    def sample_by_key_ids(self, key_ids: Any, num: int) -> torch.Tensor:
        """``num`` items for each of N users that the user does not have: LongTensor[num * N], users in turn."""
        users = np.tile(np.asarray(key_ids), num)
        items, rows = np.zeros(len(users), dtype=np.int64), np.arange(len(users))
        while len(rows):
            items[rows] = self.sampling(len(rows))
            rows = rows[self.used_ids.contains(users[rows], items[rows])]
        return torch.from_numpy(items)


def create_samplers(config: Any, dataset: Any, splits: Any) -> list[Any]:
    """RecBole's function of that name: the sampler of each phase, None without negatives."""
    if config["repeatable"]:
        from recbole.data import utils

        return [*utils.create_samplers(config, dataset, splits)]
    base: Any = None
    found: list[Any] = []
    for phase in PHASES:
        sampling = config[f"{phase}_neg_sample_args"]
        if sampling["distribution"] == "none":
            found.append(None)
            continue
        if base is None:
            base = ArraySampler([*PHASES], splits, sampling["distribution"], sampling["alpha"] if phase == "train" else 1.0)
        else:
            base.set_distribution(sampling["distribution"])
        found.append(base.set_phase(phase))
    return found
