"""The measured claims as a picture: the difference of each, its interval and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_llm.evaluation import plots
from recbole_llm.replication.judged import Judged, smallest
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN, interval

Row = tuple[str, str, float, tuple[float, float]]

_KINDS = {HOLDS: ("tab:green", "o"), FAILS: ("tab:red", "X"), OPEN: ("tab:gray", "s")}
_LINEAR = 0.05  # most differences are within
_AXIS = "difference and its 95 % interval over users (logarithmic beyond .05)"


def rows(judged: Sequence[Judged]) -> dict[str, list[Row]]:
    """Name, verdict, difference and interval of each measured claim, by board.

    Of several comparisons, the one of the smallest difference is taken, as in the README's table. Measurements that are no
    metric, such as rank correlations, are left out.
    """
    found: dict[str, list[Row]] = {}
    for one in judged:
        if one.verdict in _KINDS and (test := smallest(one))["users"] is not None:
            low, high = interval(test)
            row = (one.claim.name, one.verdict, float(test["difference"]), (float(low), float(high)))
            found.setdefault(one.board.name, []).append(row)
    return found


def draw(file: Path, shown: Mapping[str, Sequence[Row]]) -> None:
    """Write :func:`rows` as a picture (PNG)."""
    plots.intervals(file, shown, kinds=_KINDS, linear=_LINEAR, title="Measured claims", column_label=_AXIS)
