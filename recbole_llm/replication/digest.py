"""The claims of each paper in a short table, between two marks of a README: what holds, what does not, and how many are open.

Claims that are this package's own, such as controls, are in italics and counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from recbole_llm.leaderboard.embedded import replaced
from recbole_llm.replication.judged import Judged, counted, tally
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN

_MEASURED = (HOLDS, FAILS, OPEN)
BEGIN, END = "<!-- claims: written by recbole-llm replicate -->", "<!-- end of claims -->"


def with_digest(readme: str, judged: Sequence[Judged], page: str) -> str:
    """The text of a README, with the table between its marks; unchanged if it has no marks."""
    return replaced(readme, BEGIN, END, digest(judged, page)) or readme


def digest(judged: Sequence[Judged], page: str) -> str:
    """The claims as Markdown: a row for each paper, with the names of those that are decided and the number of the others.

    Args:
        page: path of the page of all claims, to which each paper links.
    """
    head = f"{tally(judged)}\n"
    if not any(one.verdict in _MEASURED for one in judged):
        return head
    papers = dict.fromkeys(one.claim.paper for one in judged)
    rows = [_row(paper, [one for one in judged if one.claim.paper == paper], page) for paper in papers]
    lines = [["paper", "measured on", HOLDS, FAILS, "others"], ["---"] * 5, *rows]
    return head + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _row(paper: str, own: Sequence[Judged], page: str) -> list[str]:
    where = dict.fromkeys(_where(one) for one in own if one.verdict in _MEASURED)
    names = [_cell("<br>".join(_name(one) for one in own if one.verdict == what)) for what in (HOLDS, FAILS)]
    anchor = re.sub(r"[^\w\- ]", "", paper.lower()).replace(" ", "-")
    link = f"[{_cell(paper.partition(' (arXiv')[0])}]({page}#{anchor})"
    return [link, _cell("<br>".join(where)), *names, counted([one for one in own if one.verdict not in (HOLDS, FAILS)])]


def _name(one: Judged) -> str:
    return f"*{one.claim.name}*" if one.claim.own else one.claim.name


def _where(one: Judged) -> str:
    """The backbone and the data."""
    result = one.result or {}
    return ", ".join(part for part in (result["backbone"], result["dataset"]) if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
