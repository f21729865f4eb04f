"""The pictures of a page: readable, the same each time, and safe whatever the labels are."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from recbole_llm.leaderboard import pictures
from recbole_llm.leaderboard.digits import significant
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard, from_json, to_json
from tests.leaderboard.boards import SCRIPT, cell


def test_labels_of_the_plot_cover_each_other_nowhere() -> None:
    rng = np.random.default_rng(3)
    facts = [{"seconds": {"train": float(10 ** rng.uniform(1, 3))}} for _ in range(16)]
    crowd = build([cell(f"Model number {place}", 0.3, seed=place, facts=facts[place]) for place in range(16)], flips=10)
    picture = pictures.cost_picture(crowd.tables[0])
    assert picture is not None
    places = re.findall(r'<text [^>]*x="(\S+)" y="(\S+)"[^>]*>Model number \d+</text>', picture)
    lefts, heights = {left for left, _ in places}, sorted(float(top) for _, top in places)
    assert len(places) == 16 and len(lefts) == 1 and min(np.diff(heights)) > 10  # the size of the font
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', picture)[0])
    assert float(lefts.pop()) < width and heights[0] >= 8 and heights[-1] <= height


def test_any_label_can_stand_in_a_picture(recwarn: pytest.WarningsRecorder) -> None:
    labels = ["电影 模型", "a]]> -- <!-- &amp; $x$ \x07 \\frac{", "two\nlines", "x" * 80]
    table = build([cell(label, 0.3, seed=place) for place, label in enumerate(labels)], flips=10).tables[0]
    for picture in (pictures.metric_picture(table), pictures.cost_picture(table), pictures.slice_picture(table)):
        texts = [re.sub("^[a-d] ", "", text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture or "")]  # without marks
        assert {html.escape(label, quote=False) for label in labels[:2]} | {"two lines", "x" * 39 + "…"} <= set(texts)
        assert "<!--" not in (picture or "")
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_a_picture_follows_the_colours_of_the_page_and_is_the_same_each_time(board: Leaderboard) -> None:
    picture = pictures.slice_picture(board.tables[0])
    assert picture is not None and picture == pictures.slice_picture(board.tables[0])
    assert {"var(--ink)", "var(--llm)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", picture))
    assert not set(re.findall(r"#[0-9a-f]{6}\b(?=[;\"])", picture)) - {"#000000"}
    assert html.escape(SCRIPT, quote=False) in picture and "<script" not in picture and "of_$x^2" in picture


def points(picture: str) -> list[tuple[float, float]]:
    """The places of the markers, from the top."""
    found = re.findall(r'<use xlink:href="#\w+" x="(\S+)" y="(\S+)" style="([^"]*)"', picture)
    ticks = "stroke-width: 0.8"
    return sorted(((float(x), float(y)) for x, y, style in found if ticks not in style), key=lambda point: point[1])


def test_the_first_metric_has_its_interval_and_shortcuts_another_style() -> None:
    cells = [cell("Good", 0.6), cell("Rule", 0.3, facts={"shortcut": True, "backbone": "texts"}), cell("Poor", 0.1)]
    table = build(cells, flips=10).tables[0]
    picture = pictures.metric_picture(table)
    assert picture is not None and table.shortcuts[0].label == "Rule"
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    values = [significant(row.metrics["hit@1"]) for row in table.rows]
    assert [text for text in texts if text in values or " " in text] == [
        text for pair in zip(["a Good", "b Rule †", "c Poor"], values, strict=True) for text in pair
    ]
    lines = re.findall(r'<path d="M (\S+) (\S+) \nL (\S+) (\S+) \n" clip-path[^>]*style="([^"]*)"', picture)
    spans = [(float(a), float(c), "dasharray" in style) for a, b, c, d, style in lines if b == d and "var(--line)" not in style]
    vertical = [float(a) for a, b, c, d, style in lines if a == c and "dasharray" in style]
    xs = [x for x, _ in points(picture)]
    assert len(spans) == 3 and all(low < x < high for (low, high, _), x in zip(spans, xs, strict=True))
    assert [dotted for *_, dotted in spans] == [False, True, False]
    hollow = re.findall(r'<use [^>]*style="fill-opacity: 0; stroke: var\(--soft\); stroke-linejoin: miter"', picture)  # a square
    assert len(hollow) == 1
    assert vertical == pytest.approx([xs[1]])  # at the best shortcut
    unit = (xs[0] - xs[2]) / (table.rows[0].metrics["hit@1"] - table.rows[2].metrics["hit@1"])
    low, high = table.rows[0].interval or (0, 0)
    assert spans[0][1] - spans[0][0] == pytest.approx(unit * (high - low), rel=1e-3)
    assert float(re.findall(r'viewBox="0 0 (\S+) ', picture)[0]) < 360  # points: text can be read on a phone


def test_one_row_alone_has_no_picture() -> None:
    assert pictures.metric_picture(build([cell("Alone", 0.4), cell("Broken", error="x")]).tables[0]) is None


def test_each_cascade_has_its_curve_with_the_break_even_point() -> None:
    points = [{"share": share, "value": 0.3 + share / 10, "half_width": 0.02} for share in (0.0, 0.5, 1.0)]
    routing = {"curve": {"metric": "hit@1", "break_even": 0.5, "points": points}}
    cells = [cell("Two models", 0.5, facts={"routing": routing}), cell("One", 0.3)]
    other = cell("Two models at random", 0.4, facts={"routing": routing, "model": "Other"})  # a row beside that of a cascade
    leaderboard = build([*cells, other], flips=10)
    table = leaderboard.tables[0]
    assert {row.label for row in table.rows if row.routing} == {"Two models"} and from_json(to_json(leaderboard)) == leaderboard
    picture = pictures.routing_picture(table)
    assert picture is not None and "Two models</text>" in picture and "hit@1</text>" in picture
    assert picture in to_html(leaderboard) and "break-even" in to_html(leaderboard)
    plain = build(cells[1:], flips=10)
    assert pictures.routing_picture(plain.tables[0]) is None and "break-even" not in to_html(plain)
