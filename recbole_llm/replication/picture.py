"""The measured claims as a picture: the difference of each, its interval and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.evaluation.plots import picture
from recbole_llm.replication.judged import Judged
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN, interval

Row = tuple[str, str, float, tuple[float, float]]

_KINDS = {HOLDS: ("tab:green", "o"), FAILS: ("tab:red", "X"), OPEN: ("tab:gray", "s")}
_LINEAR = 0.05  # most differences are within, where the axis is linear


def rows(judged: Sequence[Judged]) -> dict[str, list[Row]]:
    """Name, verdict, difference and interval of each measured claim, by board.

    Of several comparisons, the one of the smallest difference is taken. Measurements that are no metric, such as rank
    correlations, are left out.
    """
    found: dict[str, list[Row]] = {}
    for one in judged:
        test = min(one.result["tests"], key=lambda test: test["difference"]) if one.result and one.verdict in _KINDS else {}
        if test.get("users") is not None:
            low, high = interval(test)
            row = (one.claim.name, one.verdict, float(test["difference"]), (float(low), float(high)))
            found.setdefault(one.board.name, []).append(row)
    return found


def draw(file: Path, groups: Mapping[str, Sequence[Row]]) -> None:
    """Write :func:`rows` as a picture (PNG), one below another."""
    height = 1.2 + 0.19 * (sum(map(len, groups.values())) + len(groups))  # inches
    with picture(file, (9, height), constrained=False, dpi=110) as figure:  # which would take as long as all the rest
        figure.subplots_adjust(left=0.52, right=0.97, bottom=0.6 / height, top=1 - 0.6 / height)
        axes = figure.subplots()
        place, places, names, shown = 0, [], [], {}
        for group, own in groups.items():
            heading: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8, "weight": "bold"}
            axes.text(-0.02, -place, group, transform=axes.get_yaxis_transform(), **heading)
            for name, verdict, value, ends in own:
                place += 1
                places.append(-place)
                names.append(name)
                colour, marker = _KINDS[verdict]
                axes.plot(ends, (-place, -place), color=colour, linewidth=1)
                (shown[verdict],) = axes.plot(value, -place, marker, color=colour, markersize=4, linestyle="none", label=verdict)
            place += 1
        axes.set_yticks(places, names, fontsize=7)
        axes.set_xscale("symlog", linthresh=_LINEAR)
        marks = [sign * _LINEAR * share for share in (0.4, 1, 2, 4, 8, 16) for sign in (-1, 1)]
        low, high = axes.get_xlim()
        axes.set_xticks([0, *(mark for mark in marks if low <= mark <= high)], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:+.2g}")
        axes.axvline(0, color="gray", linewidth=1, linestyle=":")
        axes.set(ylim=(-place, 1))
        axes.set_xlabel("difference and its 95 % interval over users (logarithmic beyond .05)", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        handles = [shown[verdict] for verdict in _KINDS if verdict in shown]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), fontsize=7, ncols=3)
        figure.suptitle("Measured claims", x=0.02, ha="left", fontsize=10)
