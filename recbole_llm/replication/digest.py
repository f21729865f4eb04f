"""The measured claims as a table that fits on a screen, between two marks of a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.replication.claims import Board
from recbole_llm.replication.judged import Judged, counted, judge, smallest
from recbole_llm.replication.results import Results
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN

_VERDICTS = (HOLDS, FAILS, OPEN)
BEGIN, END = "<!-- claims: written by recbole-llm replicate -->", "<!-- end of claims -->"


def with_digest(readme: str, results: Results, boards: Sequence[Board]) -> str:
    """The text of a README, with the table between its marks; unchanged if it has no marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "\n" + digest(results, boards) + end + after if begin and end else readme


def digest(results: Results, boards: Sequence[Board]) -> str:
    """The measured claims as Markdown: a row for each board, a column for each verdict, and the difference of each claim.

    Of several comparisons, the difference is the smallest.
    """
    judged = judge(results, boards)
    measured = [one for one in judged if one.verdict in _VERDICTS]
    said = counted(sorted(measured, key=lambda one: _VERDICTS.index(one.verdict)))
    head = f"**{len(measured)} of {len(judged)} claims are measured**" + (f": {said}." if said else ".")
    head += " In brackets: the smallest difference of the claim's metric." if measured else ""
    if not measured:
        return head + "\n"
    rows = [f"| | {' | '.join(_VERDICTS)} |", "|---" * (1 + len(_VERDICTS)) + "|"]
    for name in dict.fromkeys(one.board.name for one in measured):
        own = [one for one in measured if one.board.name == name]
        cells = ["; ".join(map(_said, [one for one in own if one.verdict == what])) for what in _VERDICTS]
        rows.append("| " + " | ".join([_where(own[0]), *cells]) + " |")
    return "\n".join([head, "", *rows]) + "\n"


def _where(one: Judged) -> str:
    """The board, the backbone and the data."""
    result: Mapping[str, Any] = one.result or {}
    facts = ", ".join(part for part in (result["backbone"], result["dataset"]) if part)
    return _cell(f"**{one.board.name}**: {facts}")


def _said(one: Judged) -> str:
    return _cell(f"{one.claim.name} ({smallest(one)['difference']:+.3f})")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
