"""RecBole's loader of full rankings with arrays in place of an object for each user.

RecBole makes two tensors for each user of a general model and gives the history with each batch. Rankings here do not read it,
since they mask the whole history of every model alike (:mod:`recbole_llm.data.masking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor


class ArrayEvalLoader(FullSortEvalDataLoader):
    """Batches of users: their rows, no history, and the rows and items of their targets, as RecBole gives them.

    Attributes:
        uid_list: the users [U] in order; general models only.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False):
        self.is_sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if self.is_sequential:
            super().__init__(config, dataset, sampler, shuffle=shuffle)
            return
        self.logger, self.uid_field, self.iid_field = getLogger(), dataset.uid_field, dataset.iid_field
        dataset.sort(by=self.uid_field, ascending=True)
        users, items = (dataset.inter_feat[field].numpy().astype(np.int64) for field in (self.uid_field, self.iid_field))  # [R]
        codes = np.sort(users * dataset.item_num + items)
        codes = codes[np.diff(codes, prepend=-1) > 0]  # each target once
        owners, self._targets = codes // dataset.item_num, torch.from_numpy(codes % dataset.item_num)
        starts = np.flatnonzero(np.diff(owners, prepend=-1))  # [U]
        self._starts = torch.from_numpy(np.append(starts, len(owners)))
        self.uid_list = torch.from_numpy(owners[starts])
        self.user_df = dataset.join(Interaction({self.uid_field: self.uid_list}))
        self.sample_size = len(self.user_df)
        AbstractDataLoader.__init__(self, config, dataset, sampler, shuffle=False)

    def collate_fn(self, index: Any) -> tuple[Interaction, None, Tensor, Tensor]:
        """The batch of the users at ``index`` [B]: their rows, None, and rows [T] and items [T] of the targets."""
        if self.is_sequential:
            found: tuple[Interaction, None, Tensor, Tensor] = super().collate_fn(index)
            return found
        places = torch.as_tensor(np.array(index))
        starts, ends = self._starts[places], self._starts[places + 1]
        rows = torch.arange(len(places)).repeat_interleave(ends - starts)  # [T]
        within = torch.arange(len(rows)) - (torch.cumsum(ends - starts, 0) - (ends - starts))[rows]
        return self.user_df[places], None, rows, self._targets[starts[rows] + within]

    @property
    def uid2history_item(self) -> _Histories:
        """For RecBole's ``case_study``: the items of users but their targets, made when they are asked for."""
        return _Histories(self)


class _Histories:
    def __init__(self, loader: ArrayEvalLoader) -> None:
        self._loader = loader

    def __getitem__(self, users: Sequence[int]) -> list[Tensor]:
        owners, own = (
            np.repeat(self._loader.uid_list.numpy(), np.diff(self._loader._starts.numpy())),
            self._loader._targets.numpy(),
        )
        used = self._loader._sampler.used_ids
        return [torch.tensor(sorted(used[user] - set(own[owners == user].tolist())), dtype=torch.long) for user in users]
