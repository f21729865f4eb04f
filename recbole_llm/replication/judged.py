"""Claims with their results and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.replication.claims import BETTER, Board, Claim
from recbole_llm.replication.results import Results
from recbole_llm.replication.verdicts import adjusted, verdict

NOT_RUN, CHANGED = "not run", "changed after its run"


@dataclass(frozen=True)
class Judged:
    """A claim of a board, its result and its verdict."""

    board: Board
    claim: Claim
    result: Mapping[str, Any] | None
    p_values: Sequence[float | None]
    verdict: str


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
