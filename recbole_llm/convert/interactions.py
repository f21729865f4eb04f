"""The interactions of a layout as arrays, and what is left of them after the filters.

Memory: each user and item id once, the texts of each item once where the interactions have them, and 24 bytes a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recbole_llm.convert.columns import ROLES, TEXTS
from recbole_llm.convert.layout import Layout, Texts
from recbole_llm.convert.sources import ConversionError
from recbole_llm.convert.times import Times, understood
from recbole_llm.convert.values import SEPARATOR, Decimals, clean, identifier, listed, missing, number, parts, pointed, shown

REPEATS = ("exact", "first", "last", "keep")
"""Which of a user's interactions with an item stay: all but equal rows, the first or the last in time, or every row."""


@dataclass(frozen=True, eq=False)
class Interactions:
    """R interactions in the order of the file.

    Attributes:
        users, items: IntArray[R], places in ``user_ids`` and ``item_ids``.
        times: FloatArray[R] in seconds, or the number of the row where the file has no times.
        ratings: FloatArray[R]; None if there are none.
        texts: by item, those that the interactions have; empty if another table has them.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray | None
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    texts: Sequence[Texts]

    def kept(self, rows: np.ndarray) -> Interactions:
        """Those of a mask or of row numbers."""
        ratings = None if self.ratings is None else self.ratings[rows]
        return replace(self, users=self.users[rows], items=self.items[rows], times=self.times[rows], ratings=ratings)

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of users, items and interactions."""
        return len(np.unique(self.users)), len(np.unique(self.items)), len(self.users)


class _Reader:
    """Reads rows of a layout; keeps the number of the line for messages."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self.line = layout, 0
        self.users: dict[str, int] = {}
        self.items: dict[Any, int] = {}
        self.item_ids: list[str] = []
        self.texts: list[Texts] = []

    def id_of(self, role: str, value: Any) -> str:
        if isinstance(value, (dict, list, tuple)):
            raise self.error(role, value, "has several values; write the one that is the id into a column of its own")
        found = identifier(value)
        if not found or found == "[PAD]":
            raise self.error(role, value, "is not an id; fill it in, or remove the row")
        return found

    def item(self, row: dict[str, Any], roles: Sequence[str]) -> int:
        """The place of the row's item; without ids, an item is its title and brand, however they are capitalised."""
        if "item" in row:
            key: Any = self.id_of("item", row["item"])
        else:
            title = clean(row["title"])
            if not title:
                raise self.error("title", row["title"], "is not a title; fill it in, or remove the row")
            key = " ".join(title.split()).casefold(), clean(row.get("brand")).casefold()
        place = self.items.setdefault(key, len(self.items))
        if place == len(self.item_ids):
            self.item_ids.append(key if "item" in row else str(place + 1))
            if roles:
                self.texts.append({role: row[role] for role in roles})
        elif roles:  # the first row that has a text counts
            own = self.texts[place]
            for role in roles:
                if own[role] is None:
                    own[role] = row[role]
        return place

    def value(self, role: str, value: Any, read: Callable[[Any], float], reason: str) -> float:
        try:
            return read(value)
        except (ValueError, TypeError) as error:
            said = str(error) if str(error).startswith(("is ", "has ")) else reason
            raise self.error(role, value, said) from None

    def error(self, role: str, value: Any, reason: str) -> ConversionError:
        column = self._layout.inter_columns[role]
        return ConversionError(f"{self._layout.inter.shown}, line {self.line}, column {column}: {shown(value)} {reason}")


def times_of(layout: Layout, time_format: str | None) -> Times:
    """How the times of a layout are read.

    Raises:
        ConversionError: they are not understood; names file, column, value and remedy.
    """
    name = layout.inter_columns["time"]
    samples = [None if missing(value) else value for (value,) in layout.inter.sample([name])]
    if layout.inter.decimal_commas and not time_format:
        samples = [*map(pointed, samples)]
    try:
        return understood(samples, time_format or layout.time_format)
    except ValueError as error:
        raise ConversionError(f"{layout.inter.shown}, column {name}: {error}") from None


class _Gaps:
    """Counts rows that lack what an interaction needs."""

    def __init__(self, layout: Layout) -> None:
        columns = layout.inter_columns
        self._layout, self._first, self.rows = layout, 0, 0
        self._found = {role: 0 for role in ROLES[:4] if role in columns} | ({} if "item" in columns else {"title": 0})

    def in_row(self, line: int, row: dict[str, Any]) -> bool:
        """Whether the row lacks something; counts it then."""
        lacking = [role for role in self._found if missing(row[role])]
        for role in lacking:
            self._found[role] += 1
        if lacking:
            self.rows, self._first = self.rows + 1, self._first or line
        return bool(lacking)

    def counts(self) -> str:
        return ", ".join(f"{self._layout.inter_columns[role]}: {number:,}" for role, number in self._found.items() if number)

    def error(self, rows: int) -> ConversionError:
        return ConversionError(
            f"{self._layout.inter.shown}: {self.rows:,} of {rows:,} rows have an empty cell ({self.counts()}; the first is line "
            f"{self._first}); fill them in, or leave these rows out with --drop_incomplete"
        )


def collect(layout: Layout, *, time_format: str | None, drop_incomplete: bool = False) -> tuple[Interactions, list[str]]:
    """Read all interactions; also returns a line about each thing that the user should know of.

    Args:
        drop_incomplete: leave out rows that lack a value; else they are counted, and an error.

    Raises:
        ConversionError: a value is missing or is not what its column holds; names file, line, column, value and remedy.
    """
    columns, inter = layout.inter_columns, layout.inter
    reader, gaps, roles, total = _Reader(layout), _Gaps(layout), [*columns], 0
    texts = [role for role in TEXTS if role in columns]
    time = times_of(layout, time_format).read if "time" in columns else None
    commas = {role: Decimals() for role in ("time", "rating") if role in columns and inter.decimal_commas}
    read_time = time if time is None or time_format or not commas else _after(commas["time"], time)
    read_rating = None if "rating" not in columns else _after(commas["rating"], number) if commas else number
    users, items, times, ratings = array("i"), array("i"), array("d"), array("d")
    for reader.line, values in inter.rows([*columns.values(), *layout.also]):
        if layout.keeps and not layout.keeps(values[len(roles) :]):
            continue
        row, total = dict(zip(roles, values, strict=False)), total + 1
        try:  # the item comes last, so that a row that is left out adds none
            if read_time:
                at = reader.value("time", row["time"], read_time, "is not a time; fill it in, or remove the row")
            if read_rating:
                rating = reader.value("rating", row["rating"], read_rating, "is not a number; correct it, or remove the row")
            user = reader.id_of("user", row["user"])
            items.append(reader.item(row, texts))
        except ConversionError:
            if not gaps.in_row(reader.line, row):
                raise
            continue
        users.append(reader.users.setdefault(user, len(reader.users)))
        if read_time:
            times.append(at)
        if read_rating:
            ratings.append(rating)
    if gaps.rows and not drop_incomplete:
        raise gaps.error(total)
    if not users:
        raise ConversionError(f"{inter.shown} has no interactions{' without an empty cell' if gaps.rows else ''}")
    lines = [f"--drop_incomplete removes {gaps.rows:,} interactions ({gaps.counts()})"] if gaps.rows else []
    lines += [
        f"column {columns[role]}: {own.found:,} values have a decimal comma; {own.first!r} is read as {pointed(own.first)}"
        for role, own in commas.items()
        if own.found
    ]
    found_times = np.array(times) if read_time else np.arange(1.0, len(users) + 1)
    found_ratings = np.array(ratings) if read_rating else None
    names = [*reader.users], reader.item_ids, reader.texts
    return Interactions(np.array(users), np.array(items), found_times, found_ratings, *names), lines


def _after(decimals: Decimals, read: Callable[[Any], float]) -> Callable[[Any], float]:
    return lambda value: read(decimals.read(value))


def filtered(
    whole: Interactions, *, min_rating: float | None, repeats: str, k_core: int | None
) -> tuple[Interactions, list[str]]:
    """The interactions that stay, and a line about each filter that removed some and about repeats that stay.

    Args:
        min_rating: the least rating that stays.
        repeats: one of :data:`REPEATS`.
        k_core: each user has at least so many different items, and each item so many users.

    Raises:
        ConversionError: nothing is left, or ratings are asked of interactions without any.
    """
    lines: list[str] = []

    def step(rest: Interactions, rows: np.ndarray, why: str) -> Interactions:
        found = rest.kept(rows)
        if not len(found.users):
            raise ConversionError(f"{why} removes every interaction; lower it, or leave it out")
        if gone := len(rest.users) - len(found.users):
            lines.append(f"{why} removes {gone:,} interactions")
        return found

    rest = whole
    if min_rating is not None:
        if rest.ratings is None:
            raise ConversionError(
                "--min_rating: the interactions have no column of ratings; name it in --columns, or leave this out"
            )
        rest = step(rest, rest.ratings >= min_rating, f"--min_rating={min_rating:g}")
    if repeats != "keep":
        rest = step(rest, _without_repeats(rest, repeats), f"--repeats={repeats}")
    if k_core is not None:
        rest = step(rest, _core(rest, k_core), f"--k_core={k_core}")
    if again := len(rest.users) - len(_without_repeats(rest, "first")):
        lines.append(
            f"{again:,} interactions repeat an item of the same user: runs leave them out, or keep them with --rm_dup_inter=None"
        )
    return rest, lines


def _without_repeats(rest: Interactions, repeats: str) -> np.ndarray:
    """The rows that stay, in their order."""
    rows = np.arange(len(rest.users))
    order = np.lexsort((rows, rest.times, rest.items, rest.users))
    same = (rest.users[order][1:] == rest.users[order][:-1]) & (rest.items[order][1:] == rest.items[order][:-1])
    if repeats == "exact":
        same &= rest.times[order][1:] == rest.times[order][:-1]
    gone = np.append(same, False) if repeats == "last" else np.append(False, same)
    return np.sort(order[~gone])


def _core(rest: Interactions, least: int) -> np.ndarray:
    """BoolArray[R], the largest part in which all users and items have ``least`` different partners."""
    pairs, place = np.unique(rest.users.astype(np.int64) * len(rest.item_ids) + rest.items, return_inverse=True)
    users, items = np.divmod(pairs, len(rest.item_ids))
    stays = np.ones(len(pairs), dtype=bool)
    while True:
        degrees = np.bincount(users[stays], minlength=len(rest.user_ids)), np.bincount(items[stays], minlength=len(rest.item_ids))
        now = stays & (degrees[0][users] >= least) & (degrees[1][items] >= least)
        if (now == stays).all():
            return now[place]
        stays = now


def item_texts(values: Texts, separator: str | None) -> dict[str, str]:
    """The clean texts of an item by role; the values of a category are joined by the separator of lists."""
    found = {role: clean(values.get(role)) for role in TEXTS if role != "category"}
    found["year"] = found["year"].removesuffix(".0")  # as pandas writes years, if one is missing
    if isinstance(brands := listed(values.get("brand")), (list, tuple)):  # several authors
        found["brand"] = ", ".join(parts(brands, None))
    return found | {"category": SEPARATOR.join(parts(values.get("category"), separator))}
