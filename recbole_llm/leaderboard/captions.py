"""The caption below a table: how it was measured, and what its signs mean."""

from __future__ import annotations

from recbole_llm.leaderboard.protocol import protocol_words
from recbole_llm.leaderboard.table import Leaderboard, Table, smaller_is_better
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
        facts.append("± half width of the 95 % interval over seeds")
        fewer = ", ".join(
            f"{row.label} ({len(row.seeds)} of {len(row.cells)})" for row in table.rows if 0 < len(row.seeds) < len(row.cells)
        )
        facts += [f"with the seeds that have a result, in the tests too: {fewer}"] * bool(fewer)
        tested = any(row.best for row in table.rows)
        facts.append(f"bold {table.metric}: not significantly worse than the best" if tested else "the best row is not tested")
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
    own, best = str(table.metric), f"that of the best shortcut, {table.shortcuts[0].label}"
    best = f"{HEADROOM}: {f'{best}, less {own}' if smaller_is_better(table.metric) else f'{own} less {best}'}"
    best += ", on common seeds" * table.candidates_differ
    tests = "p: the largest adjusted p-value against any shortcut, or of a headroom below 0 that against the best one"
    missing = set(SHORTCUTS) - {row.model for row in table.shortcuts}
    return [rows, best, tests] + [f"shortcuts without a result: {', '.join(sorted(missing))}"] * bool(missing)
