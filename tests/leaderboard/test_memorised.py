"""The table of what LMs know before any training: one line for each backbone, in every format."""

from __future__ import annotations

import csv
import io
from typing import Any

from recbole_llm.leaderboard.digits import significant
from recbole_llm.leaderboard.formats import to_csv, to_latex, to_markdown
from recbole_llm.leaderboard.memorised import memorised
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard, Row, from_json, to_json
from tests.leaderboard.boards import KNOWN, SCRIPT, cell


def of(backbone: str, **facts: Any) -> dict[str, Any]:
    return {"backbone": backbone, "backbone_fingerprint": backbone * 2, **facts}


def board() -> Leaderboard:
    small = KNOWN | {"lines": None}
    shuffled = cell("Controlled", 0.05, model="shuffled titles", facts=of("one"))
    assert shuffled.record is not None
    for key in ("results", "slices", "ranks"):
        shuffled.record[key] = {"shuffled titles": shuffled.record[key]["Model"]}
    return build(
        [
            cell("First", 0.6, facts=of("one", memorisation=KNOWN)),
            cell("Second", 0.5, facts=of("one", memorisation=KNOWN)),
            cell("Third", 0.4, facts=of(SCRIPT, memorisation=small)),
            cell("Fourth", 0.3, facts=of("not measured")),
            shuffled,
        ],
        flips=10,
    )


def row(leaderboard: Leaderboard, label: str) -> Row:
    return next(row for row in leaderboard.tables[0].rows if row.label == label)


def test_each_backbone_has_one_line_with_its_shuffled_titles() -> None:
    leaderboard = board()
    found = memorised(leaderboard.tables[0])
    value = significant(row(leaderboard, "Controlled").metrics["hit@1"])
    assert found.to_dict("records") == [
        {
            "backbone": "one",
            "titles": "0.620 ±0.067 (chance 0.5)",
            "lines": "0.0400 ±0.0380 (chance 0.05)",
            "hit@1, shuffled titles": f"{value} (Controlled)",
        },
        {"backbone": SCRIPT, "titles": "0.620 ±0.067 (chance 0.5)", "lines": "", "hit@1, shuffled titles": ""},
    ]


def test_every_format_has_it() -> None:
    leaderboard = board()
    assert from_json(to_json(leaderboard)) == leaderboard and row(leaderboard, "First").memorisation == KNOWN
    markdown = to_markdown(leaderboard)
    assert "0.620 ±0.067 (chance 0.5)" in markdown and "<script" not in markdown.replace("\\<", "")
    assert r"0.620 $\pm$0.067 (chance 0.5) & 0.0400" in to_latex(leaderboard)
    page = to_html(leaderboard)
    assert "<h3>Memorisation</h3>" in page and "<td>0.0400 ±0.0380 (chance 0.05)</td>" in page and page.count("<script>") == 1
    lines = {line["label"]: line for line in csv.DictReader(io.StringIO(to_csv(leaderboard)))}
    assert lines["First"]["memorisation titles"] == "0.62" and lines["First"]["memorisation lines half_width"] == "0.038"
    assert lines["Third"]["memorisation lines"] == lines["Fourth"]["memorisation titles"] == ""


def test_without_a_measurement_there_is_no_table() -> None:
    leaderboard = build([cell("A", 0.5), cell("B", 0.2)], flips=10)
    assert memorised(leaderboard.tables[0]).empty
    assert "chance" not in to_markdown(leaderboard) + to_latex(leaderboard) and "Memorisation" not in to_html(leaderboard)


def test_a_control_with_other_metrics_has_no_value_here() -> None:
    control = cell("Controlled", 0.05, model="shuffled titles", facts=of("one", results={"shuffled titles": {"ndcg@9": 0.5}}))
    found = memorised(build([cell("First", 0.6, facts=of("one", memorisation=KNOWN)), control], flips=10).tables[0])
    assert found["hit@1, shuffled titles"].tolist() == [""]
