"""A leaderboard as Markdown, CSV and LaTeX; each format escapes labels, commands and errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pandas as pd

from recbole_llm.leaderboard.captions import HEADROOM, SHORTCUT_MARK, caption
from recbole_llm.leaderboard.digits import amount, decimals, duration, half, p_value, short, significant
from recbole_llm.leaderboard.marks import beaten
from recbole_llm.leaderboard.memorised import MEASUREMENTS, MEMORISED_WORDS, memorised
from recbole_llm.leaderboard.table import Leaderboard, Row, Table
from recbole_llm.store.spreadsheets import guard

_SAME = {"ndcg@1": "hit@1", "mrr@1": "hit@1"}  # equal for a single target, so not shown twice
_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar", '"': "quotedbl"}
_LATEX = str.maketrans(
    {sign: f"\\text{name}{{}}" for sign, name in _NAMES.items()}
    | {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"≥": r"$\geq$", "±": r"$\pm$", "–": "--", SHORTCUT_MARK: r"\dag{}"}
)


def shown_metrics(table: Table) -> list[str]:
    """The metrics of a table, without those that always equal another one."""
    return [name for name in table.metrics if _SAME.get(name) not in table.metrics or name == table.metric]


# heading -> attribute of a row and format
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trained parameters": ("trained_parameters", amount),
    "training": ("training_seconds", duration),
    "users/s": ("users_per_second", short),
    "peak memory": ("peak_memory_bytes", lambda value: amount(value, "B")),
}


def marked_label(row: Row) -> str:
    """The label, with a mark if the row is a shortcut."""
    return f"{row.label} {SHORTCUT_MARK}" if row.shortcut else row.label


def numbers(table: Table) -> pd.DataFrame:
    """For each row: metrics, headroom, the first metric of each slice, costs, number of seeds; NaN for missing values.

    There is no headroom without a shortcut row.
    """
    columns: dict[str, list[float | None]] = {
        name: [row.metrics.get(name) for row in table.rows] for name in shown_metrics(table)
    }
    if table.shortcuts:
        columns[HEADROOM] = [row.headroom for row in table.rows]
    for name in table.slices:
        count = next(row.slices[name].users for row in table.rows if name in row.slices)
        head = f"{table.metric} {name}" + (f" (n={count:,})" if count is not None else "")
        columns[head] = [_slice_value(row, name, table.metric) for row in table.rows]
    columns |= {head: [getattr(row, name) for row in table.rows] for head, (name, _) in _COSTS.items()}
    columns["seeds"] = [len(row.seeds) for row in table.rows]
    return pd.DataFrame(columns, dtype=float)


def texts(table: Table) -> pd.DataFrame:
    """:func:`numbers` as text, not escaped; empty for missing values."""
    forms: dict[str, Callable[[float], str]] = {"seeds": "{:.0f}".format} | {head: form for head, (_, form) in _COSTS.items()}
    shown = {
        head: ["" if math.isnan(value) else forms.get(str(head), significant)(value) for value in column]
        for head, column in numbers(table).items()
    }
    at_least = [row.training_at_least and text != "" for row, text in zip(table.rows, shown["training"], strict=True)]
    shown["training"] = ["≥ " * more + text for more, text in zip(at_least, shown["training"], strict=True)]
    for place, row in enumerate(table.rows):
        if row.headroom is not None:  # a difference is as exact as its terms
            shown[HEADROOM][place] = f"{row.headroom:+.{decimals(table.shortcuts[0].metrics[table.metric or ''])}f}"
        if row.headroom_p is not None:
            shown[HEADROOM][place] += f" (p {p_value(row.headroom_p)})"
    return pd.DataFrame(shown, dtype=object)


def _slice_value(row: Row, name: str, metric: str | None) -> float | None:
    return row.slices[name].metrics.get(metric or "") if name in row.slices else None


def _marked(table: Table, escape: Callable[[str], str], bold: str, raised: str, plus_minus: str) -> pd.DataFrame:
    """The table in a markup: ``escape`` is applied to every text, ``bold`` and ``raised`` are format strings."""
    frame = texts(table).map(escape)
    for name in shown_metrics(table):
        for place, row in enumerate(table.rows):
            text = frame.at[place, name]
            text = bold.format(text) if text and row.best and name == table.metric else text
            text += half(row.metrics.get(name, 0), row.half_width.get(name), plus_minus)
            marks = escape(beaten(row, table)) if name == table.metric else ""
            frame.at[place, name] = text + (raised.format(marks) if marks else "")
    frame.insert(0, "backbone", [escape(row.backbone or "") for row in table.rows])
    frame.insert(
        0, "model", [escape(" ".join([marked_label(row), *(f"({line})" for line in row.troubles)])) for row in table.rows]
    )
    frame.insert(0, "", [row.mark for row in table.rows])
    return frame.set_axis([escape(head) for head in frame], axis=1)


def _escaped(frame: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    return frame.map(escape).set_axis([escape(head) for head in frame], axis=1)


def to_markdown(leaderboard: Leaderboard) -> str:
    """A heading, a table and the notes of its rows for each protocol."""
    return f"# {_markdown(leaderboard.title)}\n\n" + tables_in_markdown(leaderboard, headings=True)


def tables_in_markdown(leaderboard: Leaderboard, *, headings: bool) -> str:
    """As :func:`to_markdown`, for a page with its own title; ``headings``: also of a single protocol."""
    parts = []
    for table in leaderboard.tables:
        frame = _marked(table, _markdown, "**{}**", "<sup>{}</sup>", "±")
        sides = ["left"] * 3 + ["right"] * (len(frame.columns) - 3)
        notes = [f"- {_markdown(row.label)}: {_markdown(row.note)}" for row in table.rows if row.note]
        grid = frame.to_markdown(index=False, disable_numparse=True, colalign=sides)
        parts += [f"## {_markdown(table.protocol)}"] * (headings or len(leaderboard.tables) > 1)
        parts += [grid, _markdown(caption(leaderboard, table)), "\n".join(notes)]
        if not (known := memorised(table)).empty:
            words = f"{_markdown(MEMORISED_WORDS)}:"
            parts += [words, _escaped(known, _markdown).to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(text: str) -> str:
    """Escape markup, HTML, cell separators and line breaks."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def to_latex(leaderboard: Leaderboard) -> str:
    """A ``table`` environment for each protocol; the first line names the required packages."""
    parts = [f"% {' '.join(leaderboard.title.split())}: \\usepackage[T1]{{fontenc}}, \\usepackage{{booktabs,graphicx}}"]
    for table in leaderboard.tables:
        frame = _marked(table, _latex, r"\textbf{{{}}}", r"\textsuperscript{{{}}}", r"$\pm$")
        grid = frame.to_latex(index=False, escape=False, column_format="lll" + "r" * (len(frame.columns) - 3))
        title = _latex(f"{table.protocol}: {caption(leaderboard, table)}.")
        parts.append(
            f"\\begin{{table}}\n\\centering\n\\caption{{{title}}}\n\\resizebox{{\\linewidth}}{{!}}{{%\n"
            f"{grid.strip()}}}\n\\end{{table}}"
        )
        if not (known := memorised(table)).empty:
            small = _escaped(known, _latex).to_latex(index=False, escape=False, column_format="l" * len(known.columns))
            title = _latex(f"{table.protocol}: {MEMORISED_WORDS}.")
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{title}}}\n{small.strip()}\n\\end{{table}}")
    return "\n\n".join(parts) + "\n"


def _latex(text: str) -> str:
    return " ".join(text.split()).translate(_LATEX)


def to_csv(leaderboard: Leaderboard) -> str:
    """One line for each row, with unrounded numbers; texts that begin as a formula have an apostrophe in front."""
    metrics = dict.fromkeys(name for table in leaderboard.tables for name in table.metrics)
    parts = dict.fromkeys((name, table.metric) for table in leaderboard.tables for name in table.slices)
    facts = ["backbone", "backbone_fingerprint", "trained_parameters", "training_seconds", "training_at_least"]
    facts += ["users_per_second", "peak_memory_bytes", "candidates", "note"]
    lines = []
    for table in leaderboard.tables:
        for row in table.rows:
            low, high = row.interval or (None, None)
            line = {"protocol": table.protocol, "mark": row.mark, "label": row.label, "model": row.model, "seeds": len(row.seeds)}
            line |= {"shortcut": row.shortcut, HEADROOM: row.headroom, "headroom_p": row.headroom_p}
            line |= {"first_metric": table.metric, "best": row.best, "beats": " ".join(row.beats), "low_95": low, "high_95": high}
            for name in metrics:
                line |= {name: row.metrics.get(name), f"{name} half_width": row.half_width.get(name)}
            for name, metric in parts:
                line[f"{metric} {name}"] = _slice_value(row, name, metric) if metric == table.metric else None
            for name in MEASUREMENTS:
                part = (row.memorisation or {}).get(name) or {}
                line |= {f"memorisation {name}": part.get("share"), f"memorisation {name} half_width": part.get("half_width_95")}
            lines.append(line | {fact: getattr(row, fact) for fact in facts} | {"troubles": "; ".join(row.troubles)})
    frame = pd.DataFrame(lines).map(guard).rename(columns=guard)  # so that no spreadsheet computes a text
    return frame.to_csv(index=False, lineterminator="\n")
