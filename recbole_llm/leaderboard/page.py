"""A leaderboard as one self-contained HTML page with SVG pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recbole_llm.leaderboard.captions import HEADROOM, SHORTCUT_MARK, sign_words
from recbole_llm.leaderboard.digits import half, p_value, significant
from recbole_llm.leaderboard.formats import numbers, shown_metrics, texts
from recbole_llm.leaderboard.marks import beaten, beaten_rows
from recbole_llm.leaderboard.memorised import MEMORISED_WORDS, memorised
from recbole_llm.leaderboard.pictures import cost_picture, metric_picture, routing_picture, slice_picture
from recbole_llm.leaderboard.protocol import protocol_words
from recbole_llm.leaderboard.table import Leaderboard, Table, smaller_is_better
from recbole_llm.leaderboard.templates import templates

_SHOWN = {
    "beaten": beaten,
    "beaten_rows": beaten_rows,
    "half": half,
    "memorised_words": MEMORISED_WORDS,
    "p_value": p_value,
    "shortcut_mark": SHORTCUT_MARK,
    "significant": significant,
    "smaller_is_better": smaller_is_better,
}


def to_html(leaderboard: Leaderboard, looks: Sequence[str] = ()) -> str:
    """Sortable tables with few or all columns, pictures, and the command and commit of each cell.

    Args:
        looks: names of pages in the same folder that show what rows recommend.
    """
    template = templates().get_template("page.html")
    sections = [_section(leaderboard, table) for table in leaderboard.tables]
    return template.render(board=leaderboard, sections=sections, looks=looks, **_SHOWN)


def _section(leaderboard: Leaderboard, table: Table) -> dict[str, Any]:
    """The part of a table; a cell of ``lines`` is (head, sort value, text, half width)."""
    values, shown = numbers(table), texts(table)
    lines = []
    for place, row in enumerate(table.rows):
        widths = {name: half(row.metrics.get(name, 0), row.half_width.get(name)) for name in shown_metrics(table)}
        lines.append([(head, values.at[place, head], shown.at[place, head], widths.get(str(head), "")) for head in shown])
    return {
        "table": table,
        "protocol": "; ".join(protocol_words(table)),
        "signs": "; ".join(sign_words(leaderboard, table)),
        "heads": list(shown),
        "main": main_columns(table),
        "lines": list(zip(table.rows, lines, strict=True)),
        "memorised": memorised(table),
        "metric_picture": metric_picture(table),
        "cost_picture": cost_picture(table),
        "slice_picture": slice_picture(table),
        "routing_picture": routing_picture(table),
    }


def main_columns(table: Table) -> set[str]:
    """The columns that are shown first: two metrics, headroom and costs."""
    others = [name for name in shown_metrics(table) if name != table.metric]
    second = "ndcg@10" if "ndcg@10" in others else others[0] if others else ""
    return {table.metric or "", second, HEADROOM, "trained parameters", "training", "users/s"}
