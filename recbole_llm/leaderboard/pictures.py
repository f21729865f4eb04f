"""The pictures of a page as SVG: the first metric with its intervals, against cost, and by slice."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recbole_llm.leaderboard.captions import SHORTCUT_MARK
from recbole_llm.leaderboard.digits import duration, significant, with_half_width
from recbole_llm.leaderboard.table import Row, Slice, Table

# colours of the pictures, which are replaced by the page's variables, so that they follow its dark mode
_INK, _SOFT, _LINE, _LLM, _PLAIN = "#1c1d1f", "#5d6168", "#dcdcd7", "#1f5fae", "#8a5a12"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _LLM: "var(--llm)", _PLAIN: "var(--plain)"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, not paths
    "text.parse_math": False,  # labels are not formulas
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "grid.color": _LINE,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), _SOFT),
}
_TIMES = [1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10_800, 36_000, 108_000, 360_000]  # seconds


def metric_picture(table: Table) -> str | None:
    """The first metric of each row with its 95 % interval over users, a line at the best shortcut; None unless two rows have one.

    It is narrow, so that its text can be read on a phone: names stand above the intervals, not beside them.
    """
    metric = table.metric or ""
    rows = [row for row in table.rows if metric in row.metrics]

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            value, colour = row.metrics[metric], _colour(row)
            if row.interval:
                axes.plot(row.interval, [place, place], color=colour, linewidth=1.5, linestyle=":" if row.shortcut else "-")
            shape, filled = "s" if row.shortcut or row.backbone is None else "o", "none" if row.shortcut else colour
            axes.plot(value, place, shape, color=colour, markerfacecolor=filled, markersize=5)
            axes.axhline(place + 0.32, color=_LINE, linewidth=0.5, zorder=0)
            text: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 8, "va": "center"}
            axes.text(0, place - 0.38, f"{row.mark} {_short(row)}" + f" {SHORTCUT_MARK}" * row.shortcut, color=_INK, **text)
            axes.text(1, place - 0.38, significant(value), ha="right", color=_INK, **text)
        if table.shortcuts:
            axes.axvline(table.shortcuts[0].metrics[metric], color=_SOFT, linewidth=1, linestyle="--", zorder=0)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.68, -0.7)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set(xlabel=metric)

    return _svg(draw, f"metric {table.protocol}", 4.2, 0.7 + 0.36 * len(rows)) if len(rows) > 1 else None


def cost_picture(table: Table) -> str | None:
    """The first metric by training time (logarithmic, from 1 s) as SVG; None unless two rows have both."""
    points = [
        (row.metrics[table.metric], max(row.training_seconds, 1), row)
        for row in table.rows
        if table.metric in row.metrics and row.training_seconds is not None
    ]
    points.sort(key=lambda point: point[:2])

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        for place, (value, seconds, row) in enumerate(points):
            llm = row.backbone is not None
            axes.plot(seconds, value, "o" if llm else "s", color=_LLM if llm else _PLAIN, markersize=7)
            axes.annotate(  # labels in a column at the right, so that none overlap
                _short(row),
                (seconds, value),
                (1.04, (place + 0.5) / len(points)),
                textcoords="axes fraction",
                verticalalignment="center",
                color=_INK,
                arrowprops={"arrowstyle": "-", "color": _SOFT, "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)},
            )
        axes.set_xticks([at for at in _TIMES if points and min(p[1] for p in points) / 3 <= at <= max(p[1] for p in points) * 3])
        axes.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set(xlabel="training time", ylabel=table.metric)
        axes.grid(axis="y")

    return _svg(draw, f"cost {table.protocol}", 7.5, max(4, 0.26 * len(points))) if len(points) > 1 else None


def slice_picture(table: Table) -> str | None:
    """The first metric of each row over all users and in each slice, with the interval over its users, as SVG."""
    metric = table.metric or ""
    rows = [row for row in table.rows if any(metric in part.metrics for part in row.slices.values())]
    filled = {name for row in rows for name, part in row.slices.items() if metric in part.metrics}
    names = ["all", *(name for name in table.slices if name in filled)]
    thick = 0.85 / len(names)

    def draw(axes: Axes) -> None:
        for place, name in enumerate(names):
            none = Slice(None, {}, {})
            parts = [Slice(None, row.metrics, {}) if name == "all" else row.slices.get(name, none) for row in rows]
            values = [part.metrics.get(metric, math.nan) for part in parts]
            half_widths = [part.half_width.get(metric, 0.0) for part in parts]
            heights = [at + (place - (len(names) - 1) / 2) * thick for at in range(len(rows))]
            colour: dict[str, Any] = {"color": _SOFT if name == "all" else _LLM, "alpha": 1 - 0.3 * place}
            bars = axes.barh(heights, values, 0.85 * thick, xerr=half_widths, label=name, error_kw={"ecolor": _INK}, **colour)
            both = zip(values, half_widths, strict=True)
            labels = ["" if math.isnan(value) else with_half_width(value, half or None) for value, half in both]
            axes.bar_label(bars, labels, padding=4, fontsize=8)
        axes.set_yticks(range(len(rows)), [_short(row) for row in rows], color=_INK)
        axes.margins(y=0.02)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.set(xlabel=metric)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False)

    return _svg(draw, f"slices {table.protocol}", 7, 0.8 + 0.2 * len(rows) * len(names)) if rows else None


def routing_picture(table: Table) -> str | None:
    """The curve of each cascade as SVG: the metric of its record by the share of users routed to the LLM; None without one."""
    rows = [row for row in table.rows if row.routing]
    found = [(row, (row.routing or {})["curve"]) for row in rows]

    def draw(axes: Axes) -> None:
        for place, (row, curve) in enumerate(found):
            shares, values, widths = (
                np.array([point[name] for point in curve["points"]], dtype=float) for name in ("share", "value", "half_width")
            )
            colour: dict[str, Any] = {"color": _LLM, "alpha": max(0.3, 1 - 0.25 * place)}
            axes.plot(shares, values, linewidth=1.5, label=_short(row), linestyle=["-", "--", ":", "-."][place % 4], **colour)
            axes.fill_between(shares, values - widths, values + widths, color=_LLM, alpha=0.08, linewidth=0)
            at = int(np.abs(shares - curve["break_even"]).argmin())
            axes.plot(shares[at], values[at], "o", markersize=6, **colour)
        axes.set(
            xlabel="share of users routed to the LLM", ylabel=", ".join(dict.fromkeys(curve["metric"] for _, curve in found))
        )
        axes.grid(axis="y")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    return _svg(draw, f"routing {table.protocol}", 6, 3.5) if found else None


def in_a_file(picture: str) -> str:
    """A picture of this module as a file of its own, which has no page to take colours from; its ground is white."""
    for colour, variable in _VARIABLES.items():
        picture = picture.replace(variable, colour)
    return picture.replace("<svg", '<svg style="background: white"', 1)


def _colour(row: Row) -> str:
    return _SOFT if row.shortcut else _PLAIN if row.backbone is None else _LLM


def _short(row: Row) -> str:
    text = " ".join(row.label.split())
    return text if len(text) <= 40 else text[:39] + "…"


def _svg(draw: Callable[[Axes], None], name: str, width: float, height: float) -> str:
    """An inline picture of ``width`` by ``height`` inches; ``name`` makes its ids unique."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing here, not in the browser
        figure = Figure(figsize=(width, height))
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)
    svg = file.getvalue().partition("<svg")[2]  # without the header of a file
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return f"<svg{svg}"
