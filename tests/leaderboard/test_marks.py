"""Marks of beaten rows as ranges, and in full."""

from __future__ import annotations

import string

import pytest

from recbole_llm.leaderboard.marks import beaten, beaten_rows, ranges
from recbole_llm.leaderboard.statistics import build
from tests.leaderboard.boards import cell

ORDER = [*string.ascii_lowercase, "aa", "ab", "ac"]


@pytest.mark.parametrize(
    ("marks", "text"),
    [
        ([], ""),
        (["c"], "c"),
        (["c", "d"], "c,d"),
        (["c", "d", "e"], "c–e"),
        (list("cdefghijklmnopqr"), "c–r"),
        (["h", "b", "f", "e", "d"], "b,d–f,h"),
        (["y", "z", "aa", "ac"], "y–aa,ac"),
        (["a", "aa", "ab", "ac"], "a,aa–ac"),
    ],
)
def test_three_or_more_in_a_row_are_a_range(marks: list[str], text: str) -> None:
    assert ranges(marks, ORDER) == text


def test_the_order_is_that_of_the_table_and_each_row_has_its_p_value() -> None:
    cells = [cell(name, share) for name, share in (("Poor", 0.05), ("Good", 0.9), ("Middle", 0.3))]
    table = build([*cells, cell("Close", 0.32, seed=2), cell("Broken", error="x")]).tables[0]
    good, close, middle, poor, _ = table.rows
    assert [beaten(row, table) for row in table.rows] == ["b–d", "d", "d", "", ""]
    assert close.p_values["Middle"] > 0.05 and middle.beats == ["d"] and poor.beats == []
    assert beaten_rows(good, table) == ["b Close: p < .001", "c Middle: p < .001", "d Poor: p < .001"]
