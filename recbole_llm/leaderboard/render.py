"""A leaderboard as JSON (the truth), Markdown, CSV, LaTeX, and one HTML page that needs no network.

The texts of labels, commands and errors are foreign: each format escapes them, the page by jinja2's autoescape.
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from recbole_llm.leaderboard.table import Leaderboard, Outcome, Row, Slice, Table
from recbole_llm.store.files import atomic_write

_SAME = {"ndcg@1": "hit@1", "mrr@1": "hit@1"}  # of a single target; left out beside it where people read
_COSTS: dict[str, Callable[[Row], float | None]] = {
    "trained parameters": lambda row: row.trained_parameters,
    "training": lambda row: row.training_seconds,
    "users/s": lambda row: row.users_per_second,
    "peak memory": lambda row: row.peak_memory_bytes,
}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def write_all(leaderboard: Leaderboard, folder: Path | str) -> list[Path]:
    """Write ``leaderboard.{json,md,csv,tex,html}`` into ``folder``, each whole or not at all; returns the paths."""
    made = {"json": to_json, "md": to_markdown, "csv": to_csv, "tex": to_latex, "html": to_html}
    texts = {Path(folder) / f"leaderboard.{ending}": write(leaderboard) for ending, write in made.items()}
    for path, text in texts.items():  # all could be made
        atomic_write(path, text)
    return list(texts)


# --- JSON


def to_json(leaderboard: Leaderboard) -> str:
    """Everything; strict JSON."""
    return json.dumps(asdict(leaderboard), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> Leaderboard:
    """What :func:`to_json` wrote.

    Raises:
        ValueError: it is no leaderboard.
    """
    try:
        content = json.loads(text)
        return Leaderboard(**content | {"tables": [_read_table(table) for table in content["tables"]]})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"this is not what leaderboard.json holds ({error}); make it again from its cells") from error


def _read_table(content: dict[str, Any]) -> Table:
    return Table(**content | {"rows": [_read_row(row) for row in content["rows"]]})


def _read_row(content: dict[str, Any]) -> Row:
    parts = {name: Slice(**part) for name, part in content["slices"].items()}
    return Row(**content | {"cells": [Outcome(**cell) for cell in content["cells"]], "slices": parts})


# --- numbers as people read them


def shown_metrics(table: Table) -> list[str]:
    """The metrics of a table without those that are another one."""
    return [name for name in table.metrics if _SAME.get(name) not in table.metrics or name == table.metric]


def duration(seconds: float | None) -> str:
    """42 s, 12 min, 3.5 h."""
    if seconds is None:
        return ""
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return f"{_short(seconds / size)} {unit}"


def amount(value: float | None, unit: str = "") -> str:
    """1.2 M, 350 k, 2.1 GB: powers of 1,000."""
    if value is None:
        return ""
    prefixes = ["", "k", "M", "G" if unit else "B", "T"]
    power = min(int(math.log10(value) / 3 + 1e-9), 4) if value >= 1 else 0
    return f"{_short(value / 1000**power)} {prefixes[power]}{unit}".strip()


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 9.95 else f"{value:,.0f}"


def training(row: Row) -> str:
    """What training cost, with a sign where part of it is not known."""
    return ("≥ " if row.training_at_least and row.training_seconds is not None else "") + duration(row.training_seconds)


def superscript(row: Row) -> str:
    """The letters of the rows that it beats: ``abc``, or ``a,aa`` where some have two."""
    return ("," if any(len(letter) > 1 for letter in row.beats) else "").join(row.beats)


def caption(leaderboard: Leaderboard, table: Table) -> str:
    """How to read a table."""
    told = [f"{table.users:,} users" if table.users else "", f"candidates {table.candidates[:12]}" if table.candidates else ""]
    facts = [fact for fact in told if fact]
    if table.metric:
        facts.append(f"± half width of the 95 % interval over seeds; bold {table.metric}: not significantly worse than the best")
        facts.append(
            f"superscripts: rows that it beats (paired permutation tests over users, Benjamini-Hochberg at {leaderboard.alpha:g} "
            f"over {leaderboard.tests} {'test' if leaderboard.tests == 1 else 'tests'})"
        )
    if table.detectable is not None:
        facts.append(f"smallest detectable difference {table.detectable:.3f} (power 80 %)")
    return "; ".join(facts)


def _cost_texts(row: Row) -> list[str]:
    return [
        amount(row.trained_parameters),
        training(row),
        "" if row.users_per_second is None else _short(row.users_per_second),
        amount(row.peak_memory_bytes, "B"),
    ]


def _slice_heads(table: Table) -> list[str]:
    heads = []
    for name in table.slices:
        users = next((row.slices[name].users for row in table.rows if name in row.slices), None)
        heads.append(f"{table.metric} {name}" + (f" (n={users:,})" if users is not None else ""))
    return heads


def _slice_value(row: Row, name: str, metric: str | None) -> float | None:
    return row.slices[name].metrics.get(metric or "") if name in row.slices else None


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# --- Markdown and LaTeX: the same grid, other signs


def _grid(
    table: Table, escape: Callable[[str], str], bold: Callable[[str], str], raised: Callable[[str], str], plus_minus: str
) -> list[list[str]]:
    """Header and rows of a table; ``escape`` is applied to every text, the others mark numbers."""
    shown = shown_metrics(table)
    head = ["", "model", "backbone", *shown, *_slice_heads(table), *_COSTS, "seeds"]
    lines = [[escape(text) for text in head]]
    for row in table.rows:
        metrics = []
        for name in shown:
            value, half_width = _digits(row.metrics.get(name)), row.half_width.get(name)
            text = bold(value) if value and row.best and name == table.metric else value
            text += f" {plus_minus}{half_width:.3f}" if half_width is not None else ""
            metrics.append(text + (raised(superscript(row)) if name == table.metric and row.beats else ""))
        label = " ".join([row.label, *(f"({trouble})" for trouble in row.troubles)])
        parts = [_digits(_slice_value(row, name, table.metric)) for name in table.slices]
        rest = [escape(text) for text in (*parts, *_cost_texts(row), str(len(row.seeds)))]
        lines.append([row.letter, escape(label), escape(row.backbone or ""), *metrics, *rest])
    return lines


def to_markdown(leaderboard: Leaderboard) -> str:
    """A heading and a table for each protocol, and the notes of its rows."""
    parts = [f"# {_markdown(leaderboard.title)}"]
    for table in leaderboard.tables:
        head, *rows = _grid(table, _markdown, "**{}**".format, "<sup>{}</sup>".format, "±")
        rule = ["---", "---", "---", *["---:"] * (len(head) - 3)]
        lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]
        notes = [f"- {_markdown(row.label)}: {_markdown(row.note)}" for row in table.rows if row.note]
        parts += [f"## {_markdown(table.protocol)}", "\n".join(lines), _markdown(caption(leaderboard, table)), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(text: str) -> str:
    """Text as text: no markup, no HTML, no new cell or line."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def to_latex(leaderboard: Leaderboard) -> str:
    """A ``table`` environment for each protocol; its first line names the packages that it needs."""
    parts = [f"% {' '.join(leaderboard.title.split())}: \\usepackage[T1]{{fontenc}}, \\usepackage{{booktabs,graphicx}}"]
    for table in leaderboard.tables:
        head, *rows = (
            " & ".join(line) + r" \\"
            for line in _grid(table, _latex, r"\textbf{{{}}}".format, r"\textsuperscript{{{}}}".format, r"$\pm$")
        )
        columns = "lll" + "r" * (len(shown_metrics(table)) + len(table.slices) + len(_COSTS) + 1)
        title = f"{table.protocol}: {caption(leaderboard, table)}."
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{_latex(title)}}}",
                    r"\resizebox{\linewidth}{!}{%",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    head,
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _latex(text: str) -> str:
    plain = "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
    return plain.replace("≥", r"$\geq$").replace("±", r"$\pm$")


# --- CSV


def to_csv(leaderboard: Leaderboard) -> str:
    """One line for each row, numbers as they are."""
    metrics = list(dict.fromkeys(name for table in leaderboard.tables for name in table.metrics))
    parts = list(dict.fromkeys((name, table.metric) for table in leaderboard.tables for name in table.slices))
    facts = [
        "backbone",
        "backbone_fingerprint",
        "trained_parameters",
        "training_seconds",
        "training_at_least",
        "users_per_second",
        "peak_memory_bytes",
        "candidates",
        "note",
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "protocol",
            "letter",
            "label",
            "model",
            "seeds",
            "first_metric",
            "best",
            "beats",
            "low_95",
            "high_95",
            *(f"{name}{ending}" for name in metrics for ending in ("", " half_width")),
            *(f"{metric} {name}" for name, metric in parts),
            *facts,
            "troubles",
        ]
    )
    for table in leaderboard.tables:
        for row in table.rows:
            numbers = [part.get(name) for name in metrics for part in (row.metrics, row.half_width)]
            own = [_slice_value(row, name, metric) if metric == table.metric else None for name, metric in parts]
            writer.writerow(
                [
                    table.protocol,
                    row.letter,
                    row.label,
                    row.model,
                    len(row.seeds),
                    table.metric,
                    row.best,
                    " ".join(row.beats),
                    *(row.interval or (None, None)),
                    *numbers,
                    *own,
                    *(getattr(row, fact) for fact in facts),
                    "; ".join(row.troubles),
                ]
            )
    return file.getvalue()


# --- HTML


def to_html(leaderboard: Leaderboard) -> str:
    """The page: sortable tables, accuracy against cost, slices, and the command and commit behind each cell."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files("recbole_llm.leaderboard").joinpath("page.html").read_text(encoding="utf-8")
    sections = [_section(leaderboard, table) for table in leaderboard.tables]
    return environment.from_string(source).render(
        board=leaderboard, sections=sections, cost_heads=list(_COSTS), slice_value=_slice_value, superscript=superscript
    )


def _section(leaderboard: Leaderboard, table: Table) -> dict[str, Any]:
    """What the page shows of a table; each cost as a number and as a text."""
    return {
        "table": table,
        "caption": caption(leaderboard, table),
        "metrics": shown_metrics(table),
        "slice_heads": _slice_heads(table),
        "costs": {
            row.label: list(zip((cost(row) for cost in _COSTS.values()), _cost_texts(row), strict=True)) for row in table.rows
        },
        "scatter": scatter(table),
        "bars": bars(table),
    }


WIDTH, HEIGHT = 720, 420  # of the plot, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 18, 48
_LINE, _LETTER = 14, 7.2  # height of a label's line, width of a letter


def scatter(table: Table) -> dict[str, Any] | None:
    """Geometry of the plot of the first metric against training seconds (log, from 1 s); None unless two rows have both."""
    rows = [row for row in table.rows if table.metric in row.metrics and row.training_seconds is not None]
    if len(rows) < 2 or table.metric is None:
        return None
    seconds = [math.log10(max(row.training_seconds or 0, 1)) for row in rows]
    values = [row.metrics[table.metric] for row in rows]
    low_x, high_x = math.floor(min(seconds)), max(math.ceil(max(seconds)), math.floor(min(seconds)) + 1)
    ticks = _ticks(min(values), max(values))
    low_y, high_y = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return round(_LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM), 1)

    points = [
        {
            "x": x(second),
            "y": y(value),
            "label": row.label,
            "llm": row.backbone is not None,
            "title": f"{row.label}: {table.metric} {value:.4f}, training {training(row)}",
        }
        for row, second, value in zip(rows, seconds, values, strict=True)
    ]
    _place_labels(points)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": HEIGHT - _BOTTOM,
        "points": points,
        "x_ticks": [{"at": x(power), "text": f"{10**power:,} s"} for power in range(low_x, high_x + 1)],
        "y_ticks": [{"at": y(tick), "text": f"{tick:g}"} for tick in ticks],
        "metric": table.metric,
    }


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers around ``low`` .. ``high``."""
    span = max(high - low, 1e-3)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(place * step, 10) for place in range(first, max(last, first + 1) + 1)]


def _place_labels(points: Sequence[dict[str, Any]]) -> None:
    """Put each label beside its point, left or right, at the nearest height where it covers no other label and no point."""
    taken = [(point["x"] - 5, point["x"] + 5, point["y"] - 5, point["y"] + 5) for point in points]
    for point in sorted(points, key=lambda point: point["y"]):
        point["text"] = point["label"] if len(point["label"]) <= 28 else point["label"][:27] + "…"
        width = len(point["text"]) * _LETTER
        places = [(side, shift) for shift in sorted(range(-120, 121, 6), key=abs) for side in (1, -1)]
        side, shift = next((place for place in places if _is_free(point, width, *place, taken)), (1, 0))
        taken.append(_box(point, width, side, shift))
        point |= {"text_x": point["x"] + 9 * side, "text_y": point["y"] + 4 + shift, "anchor": "start" if side > 0 else "end"}
        point["moved"] = abs(shift) > 8


def _box(point: dict[str, Any], width: float, side: int, shift: float) -> tuple[float, float, float, float]:
    near, far = point["x"] + 8 * side, point["x"] + side * (9 + width)
    return min(near, far), max(near, far), point["y"] + shift - _LINE / 2, point["y"] + shift + _LINE / 2


def _is_free(
    point: dict[str, Any], width: float, side: int, shift: float, taken: Sequence[tuple[float, float, float, float]]
) -> bool:
    left, right, top, bottom = _box(point, width, side, shift)
    inside = left >= _LEFT and right <= WIDTH and top >= 2 and bottom <= HEIGHT - _BOTTOM
    return inside and not any(left < other[1] and other[0] < right and top < other[3] and other[2] < bottom for other in taken)


def bars(table: Table) -> list[dict[str, Any]]:
    """For each row with slices: its value over all users and in each slice, bars and intervals in percent of the largest."""
    metric = table.metric or ""
    rows = [row for row in table.rows if any(metric in part.metrics for part in row.slices.values())]
    found = {row.label: _bar_values(row, metric) for row in rows}
    largest = max((value + half for values in found.values() for _, value, half in values), default=0) or 1
    return [{"label": label, "bars": [_bar(*value, largest) for value in values]} for label, values in found.items()]


def _bar_values(row: Row, metric: str) -> list[tuple[str, float, float]]:
    """Name, value and half width of all users (whose interval stands elsewhere: 0) and of each slice."""
    parts = [(name, part) for name, part in row.slices.items() if metric in part.metrics]
    own = [(name, part.metrics[metric], part.half_width.get(metric, 0.0)) for name, part in parts]
    return [("all", row.metrics[metric], 0.0), *own] if metric in row.metrics else own


def _bar(name: str, value: float, half_width: float, largest: float) -> dict[str, Any]:
    text = f"{value:.4f}" + (f" ±{half_width:.3f}" if half_width else "")
    low, high = max(value - half_width, 0.0), value + half_width
    return {"name": name, "text": text} | {
        key: round(100 * at / largest, 1) for key, at in (("width", value), ("low", low), ("span", high - low))
    }
