"""RecBole's augmented rows without their table: the list of a row is built when the row is read.

RecBole gives a sequential model one row for each interaction except a user's first. The row has the list of the items before it,
padded to ``MAX_ITEM_LIST_LENGTH``, and such a list of every other column. RecBole fills these tables in a Python loop before it
splits them, which takes 6 GB for 10 million interactions with times. Here, a row is a place in the table of interactions and a
length.

Legend: N interactions, R rows, L longest list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor


class SequenceRows(Interaction):
    """Rows whose lists are slices of columns of all interactions, which are sorted by user, then by time.

    What RecBole does with a whole table of rows (select, sort, split) leaves the lists unbuilt. Reading a list column by its
    name, or ``interaction``, builds it for all rows and keeps it, as RecBole has it.

    Args:
        fields: the other columns [R].
        lists: name of a list column -> the values [N] that it lists.
        ends: the place in these values of the row's target [R]; the list ends before it.
        lengths: lengths of the lists [R].
        longest: L.
    """

    def __init__(self, fields: dict[str, Tensor], lists: dict[str, Tensor], ends: Tensor, lengths: Tensor, longest: int) -> None:
        self._fields, self._lists, self._longest = fields, lists, longest
        self._ends, self._lengths = ends, lengths
        self.length = ends.unsqueeze(-1).shape[0]

    @property
    def interaction(self) -> dict[str, Tensor]:
        """All columns by name, lists included."""
        return {name: self[name] for name in self}

    def plain(self) -> Interaction:
        """RecBole's interaction of these rows, with their lists."""
        return Interaction(self.interaction)

    def last_of(self, name: str) -> Tensor:
        """The last entry [R] of each list of a column, without the lists."""
        return self._lists[name][self._ends - 1] if name in self._lists else _last(self._fields[name], self._lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            if index in self._lists:
                self._fields[index] = self._built(self._lists.pop(index))
            return self._fields[index]
        if isinstance(index, range):
            index = slice(index.start, index.stop, index.step)
        elif not isinstance(index, (slice, int, Tensor)):
            index = torch.as_tensor(index, dtype=torch.long if len(index) == 0 else None)
        fields = {name: values[index] for name, values in self._fields.items()}
        return SequenceRows(fields, dict(self._lists), self._ends[index], self._lengths[index], self._longest)

    def _built(self, values: Tensor) -> Tensor:
        steps = torch.arange(self._longest)
        inside = steps < self._lengths[..., None]  # [R, L]
        places = (self._ends - self._lengths)[..., None] + steps  # [R, L]
        found = values[torch.where(inside, places, 0)]  # [R, L, ...]
        found[~inside] = 0
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([*self._fields, *self._lists])

    def __contains__(self, name: object) -> bool:
        return name in self._fields or name in self._lists

    @property
    def columns(self) -> list[str]:
        return [*self]

    def __setitem__(self, name: str, values: Tensor) -> None:
        self._lists.pop(name, None)
        self._fields[name] = values

    def __delitem__(self, name: str) -> None:
        del (self._lists if name in self._lists else self._fields)[name]

    def drop(self, column: str) -> None:
        del self[column]

    def update(self, new_inter: Interaction) -> None:
        for name, values in new_inter.interaction.items():
            self[name] = values

    def _reindex(self, index: Tensor) -> None:
        self._fields = {name: values[index] for name, values in self._fields.items()}
        self._ends, self._lengths = self._ends[index], self._lengths[index]

    def sort(self, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        names = [by] if isinstance(by, str) else by
        keys = Interaction({**{name: self[name] for name in names}, "": torch.arange(self.length)})
        keys.sort(by, ascending)
        self._reindex(keys[""])

    def add_prefix(self, prefix: str) -> None:
        self._fields, self._lists = ({prefix + name: v for name, v in part.items()} for part in (self._fields, self._lists))


class UnbuiltLists:
    """Mixin before RecBole's ``SequentialDataset``, whose rows become :class:`SequenceRows`; the rows are the same ones."""

    def data_augmentation(self: Any) -> None:
        """RecBole's rows: each interaction but the user's first is a target, after at most L interactions before it."""
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        table, longest = self.inter_feat, self.max_item_list_len
        users, place = table[self.uid_field], torch.arange(len(table))  # [N]
        starts = torch.searchsorted(users, users)  # [N], the first interaction of the row's user
        ends = torch.nonzero(place > starts).flatten()  # [R]
        lengths = (ends - starts[ends]).clamp(max=longest)  # [R]
        fields = {name: table[name][ends] for name in table}
        lists = {getattr(self, f"{name}_list_field"): table[name] for name in table if name != self.uid_field}
        self.inter_feat = SequenceRows({**fields, self.item_list_length_field: lengths}, lists, ends, lengths, longest)

    def __getitem__(self: Any, index: Any, join: bool = True) -> Interaction:
        rows = self.inter_feat[index]
        rows = rows.plain() if isinstance(rows, SequenceRows) else rows
        return self.join(rows) if join else rows


def last_items(rows: Interaction, name: str, lengths: Tensor) -> Tensor:
    """The last entry [R] of each list of a column of RecBole's augmented rows, whose lists have ``lengths`` [R]."""
    return rows.last_of(name) if isinstance(rows, SequenceRows) else _last(rows[name], lengths)


def _last(lists: Tensor, lengths: Tensor) -> Tensor:
    return lists.gather(1, lengths[:, None] - 1).squeeze(1)
