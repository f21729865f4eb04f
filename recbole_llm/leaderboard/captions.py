"""The caption below a table: how it was measured, and what its signs mean."""

from __future__ import annotations

from recbole_llm.leaderboard.protocol import protocol_words
from recbole_llm.leaderboard.table import Leaderboard, Table
from recbole_llm.registry import SHORTCUTS

SHORTCUT_MARK = "†"
HEADROOM = "headroom"


def caption(leaderboard: Leaderboard, table: Table) -> str:
    """Protocol and signs in one line."""
    return "; ".join([*protocol_words(table), *sign_words(leaderboard, table)])


def sign_words(leaderboard: Leaderboard, table: Table) -> list[str]:
    """The meaning of the signs of a table, and which of its rows are shortcuts."""
    facts = []
    if table.metric:
        facts.append(f"± half width of the 95 % interval over seeds; bold {table.metric}: not significantly worse than the best")
        facts.append(
            f"superscripts: rows that it beats (paired permutation tests over users, Benjamini-Hochberg at {leaderboard.alpha:g} "
            f"over {leaderboard.tests} {'test' if leaderboard.tests == 1 else 'tests'})"
        )
    if table.detectable is not None:
        facts.append(f"smallest detectable difference {table.detectable:.3f} (power 80 %)")
    return [*facts, *_about_shortcuts(table)]


def _about_shortcuts(table: Table) -> list[str]:
    """Which rows are shortcuts, what the headroom means, and which shortcuts have no result."""
    if not table.shortcuts:
        return ["no untrained shortcut to compare with"]
    rows = f"{SHORTCUT_MARK} untrained {'shortcut' if len(table.shortcuts) == 1 else 'shortcuts'}: "
    rows += ", ".join(row.label for row in table.shortcuts)
    best = f"{HEADROOM}: {table.metric} less that of the best shortcut, {table.shortcuts[0].label}"
    tests = "p: the largest adjusted p-value against any shortcut, or of a headroom below 0 that against the best one"
    missing = set(SHORTCUTS) - {row.model for row in table.shortcuts}
    return [rows, best, tests] + [f"shortcuts without a result: {', '.join(sorted(missing))}"] * bool(missing)
