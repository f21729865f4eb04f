"""Headroom: how far a row of a leaderboard is above the untrained shortcuts of its table."""

from __future__ import annotations

from collections.abc import Mapping

from recbole_llm.leaderboard.table import Table, smaller_is_better


def add_headroom(table: Table, differences: Mapping[tuple[str, str], float]) -> None:
    """Set ``headroom`` and ``headroom_p`` of the rows that are not shortcuts, from their adjusted p-values.

    Where seeds have their own candidates, it is the difference that the test is on, that of common seeds; without one there is
    none.

    The best shortcut is the one with the highest first metric on the test users, chosen by the data that the tests are on. A row
    is above it only if it is above every shortcut, so the p-value of a positive headroom is the largest of the tests against
    them (an intersection-union test, whose level does not depend on the choice). That of any other headroom is of the test
    against the best one.

    Args:
        differences: of the first metric, by the labels of the rows that are tested.
    """
    metric, shortcuts = table.metric or "", table.shortcuts
    sign = -1 if smaller_is_better(metric) else 1
    for row in table.rows if shortcuts else []:
        if row.shortcut or metric not in row.metrics:
            continue
        difference: float | None = row.metrics[metric] - shortcuts[0].metrics[metric]
        if table.candidates_differ:
            difference = differences.get((row.label, shortcuts[0].label))
        if difference is None:
            continue
        row.headroom = sign * difference
        rivals = shortcuts if row.headroom > 0 else shortcuts[:1]
        if all(rival.label in row.p_values for rival in rivals):
            row.headroom_p = max(row.p_values[rival.label] for rival in rivals)
