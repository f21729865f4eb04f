"""Headroom: how far a row of a leaderboard is above the untrained shortcuts of its table."""

from __future__ import annotations

from recbole_llm.leaderboard.table import Table


def add_headroom(table: Table) -> None:
    """Set ``headroom`` and ``headroom_p`` of the rows that are not shortcuts, from their adjusted p-values.

    The best shortcut is the one with the highest first metric on the test users, chosen by the data that the tests are on. A row
    is above it only if it is above every shortcut, so the p-value of a positive headroom is the largest of the tests against
    them (an intersection-union test, whose level does not depend on the choice). That of any other headroom is of the test
    against the best one.
    """
    metric, shortcuts = table.metric or "", table.shortcuts
    for row in table.rows if shortcuts else []:
        if row.shortcut or metric not in row.metrics:
            continue
        row.headroom = row.metrics[metric] - shortcuts[0].metrics[metric]
        rivals = shortcuts if row.headroom > 0 else shortcuts[:1]
        if all(rival.label in row.p_values for rival in rivals):
            row.headroom_p = max(row.p_values[rival.label] for rival in rivals)
