"""The measured claims as a table that fits on a screen, between two marks of a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.leaderboard.digits import significant
from recbole_llm.replication.claims import Board
from recbole_llm.replication.judged import Judged, counted, judge
from recbole_llm.replication.results import Results
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN

BEGIN, END = "<!-- claims: written by recbole-llm replicate -->", "<!-- end of claims -->"


def with_digest(readme: str, results: Results, boards: Sequence[Board]) -> str:
    """The text of a README, with the table between its marks; unchanged if it has no marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "\n" + digest(results, boards) + end + after if begin and end else readme


def digest(results: Results, boards: Sequence[Board]) -> str:
    """The measured claims as Markdown, those that hold first; of several comparisons, the one with the smallest difference."""
    judged = judge(results, boards)
    measured = sorted((one for one in judged if one.verdict in (HOLDS, FAILS, OPEN)), key=lambda one: _ORDER[one.verdict])
    said = counted(measured)
    head = f"**{len(measured)} of {len(judged)} claims are measured**" + (f": {said}." if said else ".")
    rows = ["| claim | backbone, data | difference | |", "|---|---|---|---|", *map(_row, measured)] if measured else []
    return "\n".join([head, *([""] if rows else []), *rows]) + "\n"


_ORDER = {HOLDS: 0, FAILS: 1, OPEN: 2}


def _row(one: Judged) -> str:
    result: Mapping[str, Any] = one.result or {}
    test = min(result["tests"], key=lambda test: test["difference"])
    low, high = test["interval"]
    first, second = map(significant, test["means"])
    where = ", ".join(part for part in (result["backbone"], result["dataset"]) if part)
    sides = f"{test['better']} {first}, {test['worse']} {second}"
    shown = f"{one.claim.metric} {test['difference']:+.3f} [{low:+.3f}, {high:+.3f}]: {sides}"
    return "| " + " | ".join(part.replace("|", "\\|") for part in (one.claim.name, where, shown, f"**{one.verdict}**")) + " |"
