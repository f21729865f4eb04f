"""The leaderboard as a page: nothing injected, nothing asked for, and used in a real browser on a wide and a narrow screen."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from browser import browse, frames

from recbole_llm.leaderboard.page import main_columns, to_html
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard
from tests.leaderboard.boards import KNOWN, NASTY, SCRIPT, cell


def test_the_page_shows_foreign_text_as_text_and_asks_for_nothing(page: str) -> None:
    assert page.count("<script>") == 1 and html.escape(SCRIPT) in page  # the page's own
    page = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)  # names, not addresses
    assert not re.search(r"https?:|//\w|\ssrc=|url\((?!#)|href=\"(?!#)|@import|<link|<!--|<image", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r"\son\w+=", page)


def test_few_columns_are_the_first_metric_another_one_headroom_and_costs() -> None:
    costs = {"headroom", "trained parameters", "training", "users/s"}
    table = build([cell("A", 0.5)]).tables[0]
    assert main_columns(table) == {"hit@1", "ndcg@5"} | costs  # ndcg@1 is not shown
    assert main_columns(replace(table, metrics=["mrr@5", "hit@1", "ndcg@10"], metric="mrr@5")) == {"mrr@5", "ndcg@10"} | costs
    assert main_columns(replace(table, metrics=["ndcg@10"], metric="ndcg@10")) >= {"ndcg@10"} | costs


def test_the_page_has_plot_slices_failures_and_the_command_and_commit_of_each_cell(board: Leaderboard, page: str) -> None:
    assert page.count("<svg") == 4  # intervals and accuracy against cost, but not of one row alone; and slices of both tables
    shown = re.findall(r">0\.\d{3,4}( ±0\.\d{3,4})?</text>", page)
    assert len(shown) == 12  # two bars of four rows, which have a slice, and the intervals of four
    details = page.count("<details")
    assert details == sum(len(table.rows) for table in board.tables) == 7
    assert page.count("<pre>run --seed=") == page.count("commit 0123abc") == 9
    assert "seed 1 failed: no memory &lt;script&gt;" in page and "seed 1 has not run" in page
    assert page.count('aria-sort="descending"') == 2 and "builtin &lt;2M&gt;" in page and "&lt; .001" in page


# --- a real browser

_PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table");
  const shown = () => [...table.tBodies[0].rows].map(row => row.cells[0].dataset.value);
  const heads = [...table.tHead.rows[0].cells];
  const press = place => {
    heads[place].firstElementChild.focus();
    document.activeElement.click();
    return {rows: shown(), sorted: heads.map(head => head.getAttribute("aria-sort"))};
  };
  const columns = () => heads.filter(head => head.offsetWidth > 0).map(head => head.innerText);
  const few = columns();
  document.querySelector(".all").focus();
  document.activeElement.click();
  const found = {few, all: columns(), start: shown(), metric: press(1), again: press(1), name: press(0)};
  found.seeds = press(heads.length - 2);
  const button = document.querySelector(".beats");
  button.focus();
  document.activeElement.click();
  const open = document.querySelector(":popover-open");
  found.beats = {text: button.innerText, hover: button.title, list: [...open.querySelectorAll("li")].map(line => line.innerText)};
  location.hash = document.querySelector("tbody a").hash;
  setTimeout(() => {
    found.open = document.querySelector("details[open]")?.id;
    found.wider = document.documentElement.scrollWidth > innerWidth;
    found.scripts = document.scripts.length;
    document.body.textContent = "found" + JSON.stringify(found) + "end";
  }, 50);
});
</script>
"""


@pytest.mark.slow
def test_a_browser_sorts_by_header_and_logs_no_error(page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    printed, console = browse(file, "--dump-dom", "--virtual-time-budget=3000", "--window-size=500,900")
    assert console == ""
    told = re.search(r"found(\{.*\})end", printed)
    assert told, printed[:2000]
    found = json.loads(html.unescape(told[1]))
    assert found["few"] == ["model", "hit@1", "ndcg@5", "trained parameters", "training", "users/s", "backbone"]
    assert set(found["few"]) < set(found["all"]) and {"hit@1 cold (n=90)", "peak memory", "seeds"} <= set(found["all"])
    assert found["beats"]["text"] == "b–d" and len(found["beats"]["list"]) == 3
    assert found["beats"]["list"][0] == "b Middle: p < .001" and found["beats"]["list"][2] == f"d {NASTY}: p < .001"
    assert found["beats"]["hover"].splitlines()[1:4] == found["beats"]["list"]
    best_first = [SCRIPT, "Middle", "Bare", NASTY]
    assert found["start"][:4] == best_first and set(found["start"][4:]) == {"Broken", "Later"}
    assert found["metric"]["rows"][:4] == best_first[::-1] and set(found["metric"]["rows"][4:]) == {"Broken", "Later"}
    assert found["metric"]["sorted"][1] == "ascending" and found["again"]["sorted"][1] == "descending"
    assert found["again"]["rows"][:4] == best_first
    assert found["name"]["sorted"][:2] == ["ascending", None]
    assert [label for label in found["name"]["rows"] if label.isalpha()] == ["Bare", "Broken", "Later", "Middle"]
    assert found["seeds"]["rows"][0] == SCRIPT  # three of them
    assert found["open"] == "t1r1" and not found["wider"] and found["scripts"] == 2  # a link opens its details; no sideways page


_MEASURE = """
<script>
addEventListener("load", () => {
  if (location.hash === "#all") document.querySelectorAll(".all").forEach(box => box.click());
  const [body, wide] = [document.documentElement, document.querySelector(".wide")];
  const texts = [...document.querySelectorAll(".fit text")].map(text => text.getBoundingClientRect().height);
  const found = {width: innerWidth, page: body.scrollWidth, table: wide.scrollWidth > wide.clientWidth, text: Math.min(...texts)};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
_FRAMES = frames(("page.html", 390), ("page.html#all", 390), ("page.html", 1400), ("page.html#all", 1400))


@pytest.mark.slow
def test_wide_and_narrow_screens_show_the_page_without_scrolling_sideways(tmp_path: Path) -> None:
    cells = [cell(f"A long name of model {place} ({'x' * 60})", 0.03 * place + 0.05, seed=place) for place in range(24)]
    page = to_html(build([*cells, cell(NASTY, 0.2, facts={"memorisation": KNOWN, "backbone": "b" * 80})], flips=10))
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    (tmp_path / "frames.html").write_text(_FRAMES, encoding="utf-8")
    printed, console = browse(tmp_path / "frames.html", "--dump-dom", "--virtual-time-budget=5000", "--window-size=1600,1000")
    assert console == ""
    told = re.search(r"found(\[.*\])end", printed)
    assert told, printed[:2000]
    screens = json.loads(html.unescape(told[1]))
    assert sorted(screen["width"] for screen in screens) == [390, 390, 1400, 1400]
    assert all(screen["page"] <= screen["width"] and screen["text"] >= 9 for screen in screens)  # pixels
    assert all(screen["table"] for screen in screens if screen["width"] == 390)  # it scrolls in its own box


@pytest.mark.slow
def test_a_browser_draws_the_page_and_would_tell_of_errors(page: str, tmp_path: Path) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    _, console = browse(file, f"--screenshot={picture}", "--window-size=1000,2200")
    assert console == ""
    colours = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    assert {(0x1F, 0x5F, 0xAE), (0x8A, 0x5A, 0x12)} <= set(map(tuple, np.unique(colours.reshape(-1, 3), axis=0)))  # both marks
    file.write_text(page.replace("unfold();\n</script>", "console.error('a fault');</script>"), encoding="utf-8")
    assert "a fault" in browse(file, "--dump-dom")[1]
