"""Headroom over the shortcut rows: a case computed by hand, its test, and how each format shows it."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from scipy import stats

from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.significance import adjusted
from recbole_llm.leaderboard.captions import caption
from recbole_llm.leaderboard.formats import to_csv, to_latex, to_markdown
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Cell, Leaderboard, Row, from_json, to_json

METRICS = ("hit@1", "ndcg@5")


def cell(label: str, hits: range, *, shortcut: bool = False, seed: int = 1, **facts: Any) -> Cell:
    """Of 100 users, those in ``hits`` have rank 1 and the others rank 2."""
    ranks = [1 if user in hits else 2 for user in range(100)]
    record = {
        "results": {label: metrics.metrics(ranks, METRICS)},
        "ranks": {label: {f"u{user}": rank for user, rank in enumerate(ranks)}},
        "candidates_sha256": {"test": "a" * 64},
        "passport": {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)},
        "protocol": {"mask_history": None},
        "shortcut": shortcut,
        "seconds": {"train": 1.0},
    }
    return Cell(label, label, seed, "candidates", "run", record | facts)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    cells = [
        cell("RecentPop", range(20), shortcut=True),
        cell("TransitionGraph", range(10, 40), shortcut=True),  # .30, the best shortcut
        *(cell("Model", range(10, 50), seed=seed) for seed in (1, 2, 3)),  # .40: ten hits more, none less
        cell("Poor", range(5)),  # .05
    ]
    return build(cells)


def row(board: Leaderboard, label: str) -> Row:
    return next(row for row in board.tables[0].rows if row.label == label)


def test_headroom_is_the_difference_from_the_best_shortcut(board: Leaderboard) -> None:
    shown = {label: row(board, label).headroom for label in ("Model", "Poor", "TransitionGraph", "RecentPop")}
    assert shown == {"Model": pytest.approx(0.1), "Poor": pytest.approx(-0.25), "TransitionGraph": None, "RecentPop": None}
    assert [row.label for row in board.tables[0].shortcuts] == ["TransitionGraph", "RecentPop"] and board.tests == 6


def test_its_p_value_is_the_largest_against_any_shortcut_in_the_family_of_all_tests(board: Leaderboard) -> None:
    """By hand: the exact sign test of the users on whom two rows differ."""
    wins_and_losses = {  # users on whom only the first, only the second has a hit
        ("Model", "TransitionGraph"): (10, 0),
        ("Model", "RecentPop"): (30, 10),
        ("Model", "Poor"): (40, 5),
        ("TransitionGraph", "RecentPop"): (20, 10),
        ("TransitionGraph", "Poor"): (30, 5),
        ("RecentPop", "Poor"): (15, 0),
    }
    raw = [stats.binomtest(won, won + lost).pvalue for won, lost in wins_and_losses.values()]
    family = dict(zip(wins_and_losses, adjusted(raw), strict=True))
    model, poor = row(board, "Model"), row(board, "Poor")
    larger = max(family["Model", "TransitionGraph"], family["Model", "RecentPop"])
    assert larger == family["Model", "RecentPop"], "the worse shortcut is the harder one to be distinguished from"
    assert model.headroom_p == pytest.approx(larger) and 0.001 < larger < 0.05
    assert poor.headroom_p == pytest.approx(family["TransitionGraph", "Poor"])  # below the best one
    assert row(board, "RecentPop").headroom_p is None


def test_it_is_that_of_common_seeds_where_each_seed_has_its_own_candidates() -> None:
    """The shortcut has the first seed, on whose candidates the model is far below it; on those of the others it is above."""

    def own(seed: int) -> dict[str, Any]:
        return {"candidates_sha256": {"test": f"of {seed}"}, "config": {"candidates": {"source": "retriever"}}}

    model = [cell("Model", range(hits), seed=seed, **own(seed)) for seed, hits in ((1, 10), (2, 90), (3, 90))]
    cells = [cell("Pop", range(50), shortcut=True, **own(1)), *model, cell("Other", range(90), seed=2, **own(2))]
    board = build(cells)
    assert row(board, "Model").headroom == pytest.approx(-0.4) and (row(board, "Model").headroom_p or 1) < 0.001
    assert row(board, "Other").headroom is None and row(board, "Other").headroom_p is None, "no common seed"
    assert "the best shortcut, Pop, on common seeds" in caption(board, board.tables[0])


def test_every_format_marks_the_shortcuts_and_shows_the_headroom(board: Leaderboard) -> None:
    p = f"{row(board, 'Model').headroom_p:.3f}"
    assert from_json(to_json(board)) == board
    markdown, latex, page = to_markdown(board), to_latex(board), to_html(board)
    assert "| TransitionGraph † " in markdown and f"+0.100 (p {p})" in markdown and r"-0.250 (p \< .001)" in markdown
    assert r"TransitionGraph \dag{} &" in latex and f"+0.100 (p {p})" in latex and "†" not in latex
    assert page.count('title="untrained shortcut">†<') == 2 and f"+0.100 (p {p})" in page and 'data-value="0.1' in page
    assert "Model †" not in markdown
    lines = {line["label"]: line for line in csv.DictReader(io.StringIO(to_csv(board)))}
    assert {label: line["shortcut"] for label, line in lines.items()} == {
        "TransitionGraph": "True",
        "RecentPop": "True",
        "Model": "False",
        "Poor": "False",
    }
    assert float(lines["Model"]["headroom"]) == pytest.approx(0.1) and float(lines["Model"]["headroom_p"]) == pytest.approx(
        float(p), abs=1e-3
    )
    assert lines["RecentPop"]["headroom"] == ""


def test_the_caption_says_what_headroom_is_and_which_shortcuts_are_missing(board: Leaderboard) -> None:
    text = caption(board, board.tables[0])
    assert "; † untrained shortcuts: TransitionGraph, RecentPop; headroom: hit@1 less" in text
    assert "headroom: hit@1 less that of the best shortcut, TransitionGraph; p: the largest" in text
    assert text.endswith("shortcuts without a result: NearestTexts, NearestTitles, RepeatRule")


def test_without_shortcuts_there_is_no_headroom() -> None:
    board = build([cell("Model", range(10)), cell("Poor", range(5))])
    assert row(board, "Model").headroom is None and "headroom" not in to_markdown(board)
    assert "no untrained shortcut to compare with" in caption(board, board.tables[0])
    alone = build([cell("RecentPop", range(10), shortcut=True)])
    assert row(alone, "RecentPop").headroom is None and "headroom" in to_markdown(alone)


def test_a_row_that_cannot_be_tested_has_a_headroom_without_p() -> None:
    board = build([cell("RecentPop", range(10), shortcut=True), cell("Model", range(30), ranks={"Model": {}})])
    assert row(board, "Model").headroom == pytest.approx(0.2) and row(board, "Model").headroom_p is None
    assert "+0.200 |" in to_markdown(board)
