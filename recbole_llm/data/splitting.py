"""The rows of training, validation and test data in every form of data (:mod:`recbole_llm.data.forms`).

RecBole splits the rows of general models and the augmented rows of sequential models separately. So ratio splits have different
targets for the two, and files that are split already can be read only for general models, unless they have a column
``item_id_list``. Here, RecBole's general dataset splits the table once for all models, and a sequential model gets the augmented
rows of these targets. Leave-one-out by time remains RecBole's own for both (:func:`~recbole_llm.data.forms.leaves_one_out`).

Legend: R rows of the .inter file or files, U users.
"""

from __future__ import annotations

import copy
from functools import cached_property
from logging import getLogger
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import FeatureType
from recbole.utils.enum_type import FeatureSource

from recbole_llm.data import forms
from recbole_llm.store.random_state import preserved_random_state

logger = getLogger()

TRAIN, VALID, TEST = range(3)
_ROW = "row of the file"
_PLACE = "place in the history"  # the column of times with TIME_FIELD: ~


class Split:
    """Mixin for a RecBole dataset class; :class:`~recbole_llm.data.dataset.RankedTime` has what is ordered by time."""

    @cached_property
    def division(self: Any) -> list[np.ndarray] | None:
        """Row numbers of training, validation and test data; None where RecBole's classes split.

        Must be read first before :meth:`build`, whose splits copy it.
        """
        if self.uid_field is None or forms.leaves_one_out(self.config):
            return None
        return _by_file(self.file_size_list) if self.config["benchmark_filename"] else self._by_recbole()

    @property
    def part(self: Any) -> np.ndarray:
        """The part of each row [R]; the same for all where RecBole's classes split."""
        found = np.full(len(self.inter_feat), TRAIN)
        for part, rows in enumerate(self.division or ()):
            found[rows] = part
        return found

    @cached_property
    def held_out(self: Any) -> np.ndarray | None:
        """Numbers of validation and test rows of each user [U, 2]; None where RecBole's classes split."""
        if self.division is None:
            return None
        users = self.inter_feat[self.uid_field].to_numpy()
        counts = [np.bincount(users[rows], minlength=self.user_num) for rows in self.division[VALID:]]
        return np.stack(counts, axis=1)

    def _by_recbole(self: Any) -> list[np.ndarray]:
        """The rows that RecBole's general dataset puts into each part, in its order."""
        order, columns = np.arange(len(self.inter_feat)), {}
        if forms.needs_time(self.config):
            order = self.time_order
            columns[self.time_field] = np.unique(self._times, return_inverse=True)[1].astype(np.float64)[order]
        columns |= {self.uid_field: self.inter_feat[self.uid_field].to_numpy()[order], _ROW: order}
        plain = Dataset.__new__(Dataset)
        plain.__dict__.update(self.__dict__)
        plain.config = copy.copy(self.config)
        plain.config.final_config_dict = {**self.config.final_config_dict, "unused_col": None}
        plain.inter_feat, plain.feat_name_list = pd.DataFrame(columns), ["inter_feat"]
        plain.field2type = {**self.field2type, _ROW: FeatureType.TOKEN}
        with preserved_random_state():
            torch.manual_seed(self.config["seed"])  # for order: RO; RecBole has drawn nothing before it
            return [split.inter_feat[_ROW].numpy() for split in plain.build()]

    def build(self: Any) -> Any:
        """The training, validation and test datasets.

        Raises:
            ValueError: there are no training or no test rows.
        """
        if self.division is None:
            return super().build()  # type: ignore[misc]
        rows = self._usable()
        if self._augments:
            order = self._order
            users = self.inter_feat[self.uid_field].to_numpy()[order]
            follows = order[1:][users[1:] == users[:-1]]  # rows with an earlier row of the same user, as RecBole augments them
            place = np.full(len(order), -1)
            place[follows] = np.arange(len(follows))
            rows = [np.sort(found[found >= 0]) for found in (place[own] for own in rows)]
            self._set_time(order)
        for own, name in zip(rows, ("training", None, "test"), strict=True):
            if name and not len(own):
                raise ValueError(f"{forms.described(self.config)} leaves no {name} interactions of {self.dataset_name}")
        if not len(rows[VALID]):
            logger.info(f"{forms.described(self.config)}: no validation data, so a training ends with its last epoch")
        self._change_feat_format()
        self._drop_unused_col()
        return [self.copy(self.inter_feat[own]) for own in rows]

    def _usable(self: Any) -> list[np.ndarray]:
        """The :attr:`division` without evaluation rows of users without earlier rows: sequential models read no empty history."""
        assert self.division is not None
        if forms.reads_labels(self.config):
            return self.division
        if self._has_lists:
            lengths = self.inter_feat[self.list_field].map(len).to_numpy()
            return [rows[lengths[rows] > 0] for rows in self.division] if isinstance(self, SequentialDataset) else self.division
        users, known, found = self.inter_feat[self.uid_field].to_numpy(), np.zeros(self.user_num, dtype=bool), []
        for part, rows in enumerate(self.division):
            found.append(rows if part == TRAIN else rows[known[users[rows]]])
            known[users[rows]] = True
            if lost := len(rows) - len(found[-1]):
                name = ("training", "validation", "test")[part]
                logger.info(
                    f"{forms.described(self.config)}: {lost} {name} interactions of users without earlier ones are left out"
                )
        return found

    # -- files that are split already, for sequential models ------------------------------------------------------------------

    @property
    def list_field(self: Any) -> str:
        """The column of histories in files that are split for RecBole's sequential models."""
        return f"{self.iid_field}{self.config['LIST_SUFFIX']}"

    @property
    def _has_lists(self: Any) -> bool:
        return bool(self.config["benchmark_filename"]) and self.list_field in self.inter_feat

    @property
    def _augments(self: Any) -> bool:
        """Whether histories are made from the rows, as for one file, and not read from :attr:`list_field`."""
        return isinstance(self, SequentialDataset) and not self._has_lists

    def _change_feat_format(self: Any) -> None:
        super()._change_feat_format()  # type: ignore[misc]
        if self.config["benchmark_filename"] and self._augments:
            self.data_augmentation()  # RecBole expects lists in these files

    def _aug_presets(self: Any) -> None:
        super()._aug_presets()  # type: ignore[misc]
        self.item_id_list_field = self.list_field  # by this name, whatever ITEM_ID_FIELD is

    def _benchmark_presets(self: Any) -> None:
        if not self._has_lists:
            return
        longest, limit = self.inter_feat[self.list_field].map(len).max(), self.config["MAX_ITEM_LIST_LENGTH"]
        if longest > limit:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH: {limit} is less than the {longest} items in a {self.list_field} of {self.dataset_path}; "
                f"give --MAX_ITEM_LIST_LENGTH={longest}"
            )
        self.item_id_list_field = self.list_field
        super()._benchmark_presets()  # type: ignore[misc]

    def _set_alias(self: Any, alias_name: str, default_value: list[str]) -> None:
        """As RecBole's; items of histories have the ids of other items."""
        lists = [self.list_field] if alias_name == "item_id" and self.list_field in self.field2type else []
        super()._set_alias(alias_name, [*default_value, *lists])  # type: ignore[misc]

    def _set_time(self: Any, order: np.ndarray) -> None:
        """Sort the rows, and replace the times, by which RecBole orders histories, by numbers that never fall within a user.

        They are ranks of the times, which users have in common, or without times the place in the user's rows. RecBole's sort is
        stable, so float32, which has 24 bits, may make some equal. In a later file, a rank is at least the one before it.
        """
        users = self.inter_feat[self.uid_field].to_numpy()[order].astype(np.int64)
        if self.time_field in self.inter_feat:
            ranks = np.unique(self._times, return_inverse=True)[1][order]  # [R]
            each = len(order) * users
            places = np.maximum.accumulate(each + ranks) - each
        else:
            places = np.arange(len(order)) - np.searchsorted(users, users)
        self.time_field = self.time_field or _PLACE
        self.set_field_property(self.time_field, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)
        self.inter_feat[self.time_field] = places.astype(np.float64)

    def _before_first_row(self: Any, users: np.ndarray, items: np.ndarray, order: np.ndarray) -> dict[int, list[int]]:
        """User -> the items in the list of the user's first row, which have no rows of their own; nothing without lists.

        Args:
            users, items: internal ids of the rows in ``order``.

        Raises:
            ValueError: a list does not continue that of the user's row before it.
        """
        found: dict[int, list[int]] = {}
        if not self._has_lists:
            return found
        lists, last_user = self.inter_feat[self.list_field].to_numpy()[order], 0
        for row, (user, known) in enumerate(zip(users.tolist(), map(list, lists), strict=True)):
            if user != last_user:
                found[user] = known
            elif not known or known[-1] not in (items[row - 1], lists[row - 1][-1]):
                name = self.field2id_token[self.uid_field][user]
                raise ValueError(
                    f"benchmark_filename: an entry of {self.list_field} of user {name} does not end with the item of the row "
                    "before it; list whole histories without padding, or remove the column: histories are then made from the rows"
                )
            last_user = user
        return found


def _by_file(sizes: list[int]) -> list[np.ndarray]:
    """Row numbers of the parts of two files (training and test) or three."""
    ends = np.cumsum([0, *sizes])
    found = [np.arange(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    return found if len(found) == 3 else [found[0], np.empty(0, dtype=np.int64), found[1]]
