"""Claims with their results and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.replication.claims import BETTER, Board, Claim
from recbole_llm.replication.results import Results
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN, adjusted, verdict

NOT_RUN, CHANGED = "not run", "changed after its run"


@dataclass(frozen=True)
class Judged:
    """A claim of a board, its result and its verdict."""

    board: Board
    claim: Claim
    result: Mapping[str, Any] | None
    p_values: Sequence[float | None]
    verdict: str


def counted(judged: Sequence[Judged]) -> str:
    """How many claims have each verdict, in words."""
    counts, several = Counter(one.verdict for one in judged), {HOLDS: "hold", FAILS: "do not hold"}
    known = [(what, counts[what]) for what in (HOLDS, FAILS, OPEN, NOT_RUN, CHANGED) if counts[what]]
    return ", ".join(f"{count} {several.get(what, what) if count > 1 else what}" for what, count in known)


def tally(judged: Sequence[Judged]) -> str:
    """How many claims have each verdict, those of the papers apart from our own, as Markdown."""
    theirs = [one for one in judged if not one.claim.own]
    ours = [one for one in judged if one.claim.own]
    parts = [(theirs, "of the papers"), (ours, "of our own, such as controls")]
    said = [f"{len(part)} {whose}: {counted(part)}" for part, whose in parts if part]
    return f"**{len(judged)} claims**. " + ". ".join(said) + "."


def judge(results: Results, boards: Sequence[Board]) -> list[Judged]:
    """Every claim with its verdict; the p-values of all measured claims are one family."""
    listed = [(board, claim, results.get(board.name, {}).get(claim.name)) for board in boards for claim in board.claims]
    known = {
        (board.name, claim.name, place): test["p_value"]
        for board, claim, result in listed
        if result and claim.kind == BETTER
        for place, test in enumerate(result["tests"])
        if test["p_value"] is not None
    }
    family, found = adjusted(known), []
    for board, claim, result in listed:
        p_values = [family.get((board.name, claim.name, place)) for place in range(len(result["tests"]))] if result else []
        if result is None:
            what = NOT_RUN
        elif result["fingerprint"] != board.fingerprint(claim):
            what = CHANGED
        else:
            what = verdict(result["tests"], claim.margin, claim.kind, p_values)
        found.append(Judged(board, claim, result, p_values, what))
    return found
