"""Predictions that were made elsewhere, read from a Parquet, CSV or JSON lines file: one line per user and item.

Ids are the tokens of the dataset. A line has a score (higher is better) or a rank (1 is best). A malformed file is refused with
the place and the remedy. Missing users and items are not errors here; :mod:`recbole_llm.model.imported` counts them.

Legend: N lines, B users of a batch, I items, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recbole_llm.evaluation.prediction_tables import read_table

logger = getLogger()

ALIASES = {
    "user": ("user", "user_id", "uid", "userid"),
    "item": ("item", "item_id", "iid", "itemid"),
    "score": ("score", "scores", "prediction", "predictions", "pred"),
    "rank": ("rank", "position"),
    "row": ("row",),
}
"""Names by which a column is found, in any case and with or without RecBole's ``:type``."""


@dataclass(frozen=True)
class Predictions:
    """The rankings of a file, by internal id.

    Attributes:
        columns: the file's name of each column that was read.
        row: the value of its column ``row`` that was read; None without such a column.
        starts: where each user's lines begin, and the end [U + 1].
        items: the item of each line [N], each user's best first.
        places: its place [N], from 0; equal scores share one.
        item_count: I.
    """

    columns: Mapping[str, str]
    row: str | None
    starts: np.ndarray
    items: np.ndarray
    places: np.ndarray
    item_count: int

    @property
    def lengths(self) -> np.ndarray:
        """Number of lines of each user [U]."""
        return np.diff(self.starts)

    def listed(self, user: int) -> np.ndarray:
        """The items of a user, best first."""
        return self.items[self.starts[user] : self.starts[user + 1]]

    def scores(self, users: Tensor) -> Tensor:
        """Scores [B, I] of the catalogue for users [B]: minus the place, and minus infinity for what the file does not list.

        Places keep apart what float32 would round to one score.
        """
        who = users.cpu().numpy()
        lengths = self.lengths[who]  # [B]
        rows = np.repeat(np.arange(len(who)), lengths)
        lines = np.arange(len(rows)) + np.repeat(self.starts[who] - (np.cumsum(lengths) - lengths), lengths)
        found = torch.full((len(who), self.item_count), -torch.inf)
        found[torch.from_numpy(rows), torch.from_numpy(self.items[lines])] = -torch.from_numpy(self.places[lines]).float()
        return found


class _Lines:
    """The lines of a file, with errors that name file, row, column and remedy. Rows count from 1, without the header."""

    def __init__(self, path: Path, given: Mapping[str, str | None]):
        self.path, self.table = path, read_table(path)
        self.columns = _chosen_columns(path, self.table.column_names, given)
        if not len(self.table):
            raise ValueError(f"predictions: {path} has no rows; write one for each user and item")
        self.numbers = np.arange(1, len(self.table) + 1)

    def error(self, place: int, role: str, reason: str, remedy: str) -> ValueError:
        where = f"row {self.numbers[place]}, column {self.columns[role]}"
        return ValueError(f"predictions: {self.path}, {where}: {reason}; {remedy}")

    def choose(self, row: str | None) -> str | None:
        """Keep the lines of one row of results, by default the first; returns its name."""
        if "row" not in self.columns:
            if row is not None:
                raise ValueError(f"predictions_row: {self.path} has no column `row`; remove predictions_row={row}")
            return None
        names = self.table[self.columns["row"]].cast(pa.string())
        known = [name for name in names.unique().to_pylist() if name is not None]
        chosen = row if row is not None else next(iter(known), None)
        if chosen not in known:
            raise ValueError(f"predictions_row: {self.path} has no row {chosen!r}; it has: {', '.join(known) or 'none'}")
        kept = pc.equal(names, chosen).combine_chunks().fill_null(False)
        self.table, self.numbers = self.table.filter(kept), self.numbers[kept.to_numpy(zero_copy_only=False)]
        return chosen

    def ids(self, role: str, tokens: Sequence[str], key: str) -> np.ndarray:
        """Internal ids [N] of a column of tokens."""
        column, kind = self.table[self.columns[role]], self.table[self.columns[role]].type
        if pa.types.is_floating(kind) and _all_whole(column):
            column = column.cast(pa.int64())  # whole numbers that pandas keeps as 265.0
        elif not (pa.types.is_integer(kind) or _is_text(kind)):
            reason = f"column {self.columns[role]}: {kind} values cannot be {role} ids"
            raise ValueError(f"predictions: {self.path}, {reason}; give the tokens of {key}")
        texts = column.cast(pa.string()).combine_chunks()
        known = pa.array(tokens[1:], pa.string())
        found = pc.index_in(texts, value_set=known)
        if found.null_count:
            place = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
            token = texts[place].as_py()
            reason = f"the {role} is missing" if token is None else f"there is no {role} {token!r} in the dataset"
            remedy = (
                f"its ids are the tokens of {key} in the .inter file, such as {tokens[1]!r}; correct the id, or leave the row out"
            )
            raise self.error(place, role, reason, remedy)
        return found.to_numpy().astype(np.int64) + 1

    def values(self, role: str) -> np.ndarray:
        """A column of numbers [N] as float64."""
        column = self.table[self.columns[role]].combine_chunks()
        remedy = "give a number such as 0.25, or leave the row out, which then counts as not predicted"
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or _is_text(column.type)):
            raise ValueError(
                f"predictions: {self.path}, column {self.columns[role]}: {column.type} values are not {role}s; {remedy}"
            )
        if column.null_count:
            place = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise self.error(place, role, f"the {role} is missing", remedy)
        if _is_text(column.type):
            wrong = _first_without_number(column)
            if wrong is not None:
                raise self.error(wrong, role, f"{column[wrong].as_py()!r} is not a number", remedy)
        values = column.cast(pa.float64(), safe=False).to_numpy()
        odd = np.flatnonzero(np.isnan(values) | (values == np.inf))
        if len(odd):
            raise self.error(int(odd[0]), role, f"{values[odd[0]]} cannot be ranked", remedy)
        return values


def read_predictions(
    path: Path,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    *,
    columns: Mapping[str, str | None] | None = None,
    row: str | None = None,
) -> Predictions:
    """Read a file of predictions.

    Args:
        user_ids, item_ids: tokens by internal id; [0] is padding.
        columns: names of the file's columns by role (``user``, ``item``, ``score``, ``rank``, ``row``), where they are not found.
        row: the value of the column ``row`` to read, by default the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit the dataset; names file, row, column and remedy.
    """
    lines = _Lines(path, columns or {})
    chosen = lines.choose(row)
    users, items = lines.ids("user", user_ids, "USER_ID_FIELD"), lines.ids("item", item_ids, "ITEM_ID_FIELD")
    values = {role: lines.values(role) for role in ("score", "rank") if role in lines.columns}
    _check_pairs(lines, users, items, len(item_ids), (user_ids, item_ids))
    best_first = -values["score"] if "score" in values else values["rank"]  # [N]
    if len(values) == 2:
        _check_order(lines, users, values["rank"], best_first, user_ids)
    ranked = np.flatnonzero(best_first < np.inf)  # a score of minus infinity: not recommended
    order = ranked[np.lexsort((items[ranked], best_first[ranked], users[ranked]))]
    users, items, best_first = users[order], items[order], best_first[order]
    starts = np.searchsorted(users, np.arange(len(user_ids) + 1))
    new = np.ones(len(users), dtype=np.int64)  # whether a line has another score than the line above
    new[1:] = (users[1:] != users[:-1]) | (best_first[1:] != best_first[:-1])
    count = np.cumsum(new)
    first = count[starts[:-1].clip(max=max(len(count) - 1, 0))] if len(count) else count
    places = (count - np.repeat(first, np.diff(starts))) if len(count) else count
    read = ", ".join(f"{role} = {name}" for role, name in lines.columns.items())
    logger.info(f"predictions: {path}, {len(lines.numbers)} rows{f' of {chosen}' if chosen else ''}, columns {read}")
    return Predictions(lines.columns, chosen, starts, items, places, len(item_ids))


def _chosen_columns(path: Path, names: Sequence[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """The file's column of each role that it has."""
    found = {}
    for role, aliases in ALIASES.items():
        if (name := given.get(role)) is not None:
            if name not in names:
                raise ValueError(f"predictions_columns: {path} has no column {name!r}; it has: {', '.join(names) or 'none'}")
            found[role] = name
            continue
        plain = {name.strip().lower().partition(":")[0]: name for name in reversed(names)}
        if alias := next((alias for alias in aliases if alias in plain), None):
            found[role] = plain[alias]
    for needed in ("user", "item"):
        if needed not in found:
            raise ValueError(_no_column(path, needed, names))
    if "score" not in found and "rank" not in found:
        raise ValueError(_no_column(path, "score", names))
    return found


def _no_column(path: Path, role: str, names: Sequence[str]) -> str:
    either = " and none of ranks" if role == "score" else ""
    return (
        f"predictions: {path} has no column of {role}s{either} (columns: {', '.join(names) or 'none'}); name it with "
        f"predictions_columns: {{'{role}': COLUMN}}, or call it {' or '.join(ALIASES[role][:2])}"
    )


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def _all_whole(column: pa.ChunkedArray) -> bool:
    values = column.drop_null().to_numpy()
    return bool((np.isfinite(values) & (np.abs(values) < 2**53) & (values == np.round(values))).all())


def _first_without_number(column: pa.Array) -> int | None:
    """The place of the first text that is not a number, found by halving."""

    def fails(part: pa.Array) -> bool:
        try:
            part.cast(pa.string()).cast(pa.float64())
        except pa.ArrowInvalid:
            return True
        return False

    if not fails(column):
        return None
    start, length = 0, len(column)
    while length > 1:
        half = length // 2
        if fails(column.slice(start, half)):
            length = half
        else:
            start, length = start + half, length - half
    return start


def _check_pairs(
    lines: _Lines, users: np.ndarray, items: np.ndarray, width: int, tokens: tuple[Sequence[str], Sequence[str]]
) -> None:
    keys = users * width + items
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again):
        first, second = sorted((int(order[again[0]]), int(order[again[0] + 1])))
        reason = f"user {tokens[0][users[first]]!r} has item {tokens[1][items[first]]!r} in row {lines.numbers[first]}, too"
        raise lines.error(second, "item", reason, "keep one of them")


def _check_order(lines: _Lines, users: np.ndarray, ranks: np.ndarray, best_first: np.ndarray, user_ids: Sequence[str]) -> None:
    """Refuse scores that fall where ranks rise: such scores are distances, or belong to another ranking."""
    order = np.lexsort((best_first, ranks, users))
    same = (users[order][1:] == users[order][:-1]) & (ranks[order][1:] > ranks[order][:-1])
    wrong = np.flatnonzero(same & (best_first[order][1:] < best_first[order][:-1]))
    if len(wrong):
        place = int(order[wrong[0] + 1])
        reason = f"user {user_ids[users[place]]!r} has a higher score at rank {ranks[place]:g} than at the rank before it"
        remedy = "higher scores must be better: negate distances, or leave out the column that is not to count"
        raise lines.error(place, "score", reason, remedy)
