"""Which rows a row beats, in a short and in a complete form."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_llm.leaderboard.digits import p_value
from recbole_llm.leaderboard.table import Row, Table


def beaten(row: Row, table: Table) -> str:
    """The marks of the rows that ``row`` beats: ``c–r``, or ``b,d–f,h``."""
    return ranges(row.beats, [other.mark for other in table.rows if other.mark])


def ranges(marks: Sequence[str], order: Sequence[str]) -> str:
    """``marks`` in the order of ``order``; three or more in a row are written as a range."""
    places = sorted(order.index(mark) for mark in marks)
    starts = [place for place in places if place - 1 not in places]
    ends = [place for place in places if place + 1 not in places]
    return ",".join(_range(order[start : end + 1]) for start, end in zip(starts, ends, strict=True))


def _range(marks: Sequence[str]) -> str:
    return f"{marks[0]}–{marks[-1]}" if len(marks) > 2 else ",".join(marks)


def beaten_rows(row: Row, table: Table) -> list[str]:
    """A line for each row that ``row`` beats, with the adjusted p-value of the test."""
    return [
        f"{other.mark} {other.label}: p {p_value(row.p_values[other.label])}" for other in table.rows if other.mark in row.beats
    ]
