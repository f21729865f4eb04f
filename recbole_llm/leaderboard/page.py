"""A leaderboard as one self-contained HTML page with SVG pictures."""

from __future__ import annotations

import importlib.resources
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.ticker
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recbole_llm.leaderboard.formats import SHORTCUT_MARK, caption, duration, numbers, p_value, shown_metrics, superscript, texts
from recbole_llm.leaderboard.table import Leaderboard, Row, Slice, Table

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


def to_html(leaderboard: Leaderboard) -> str:
    """Sortable tables, pictures of cost and slices, and the command and commit of each cell."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files("recbole_llm.leaderboard").joinpath("page.html").read_text(encoding="utf-8")
    sections = [_section(leaderboard, table) for table in leaderboard.tables]
    shown = {"superscript": superscript, "p_value": p_value, "shortcut_mark": SHORTCUT_MARK}
    return environment.from_string(source).render(board=leaderboard, sections=sections, **shown)


def _section(leaderboard: Leaderboard, table: Table) -> dict[str, Any]:
    """The part of a table; a cell of ``lines`` is (head, sort value, text, half width)."""
    values, shown = numbers(table), texts(table)
    lines = []
    for place, row in enumerate(table.rows):
        half_widths = {name: row.half_width.get(name) for name in shown_metrics(table)}
        lines.append([(head, values.at[place, head], shown.at[place, head], half_widths.get(head)) for head in shown])
    return {
        "table": table,
        "caption": caption(leaderboard, table),
        "heads": list(shown),
        "lines": list(zip(table.rows, lines, strict=True)),
        "cost_picture": cost_picture(table),
        "slice_picture": slice_picture(table),
    }


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
            labels = [f"{value:.4f}" + (f" ±{half:.3f}" if half else "") for value, half in zip(values, half_widths, strict=True)]
            axes.bar_label(bars, ["" if label == "nan" else label for label in labels], padding=4, fontsize=8)
        axes.set_yticks(range(len(rows)), [_short(row) for row in rows], color=_INK)
        axes.margins(y=0.02)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.set(xlabel=metric)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False)

    return _svg(draw, f"slices {table.protocol}", 7, 0.8 + 0.2 * len(rows) * len(names)) if rows else None


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
