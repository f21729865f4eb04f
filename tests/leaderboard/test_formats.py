"""The leaderboard as JSON, Markdown, CSV, LaTeX and as a page: nothing lost, nothing injected, readable in a real browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from recbole_llm.evaluation import metrics
from recbole_llm.leaderboard import formats
from recbole_llm.leaderboard import page as pages
from recbole_llm.leaderboard.board import write_all
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Cell, Leaderboard, from_json, to_json

SCRIPT = "<script>alert(1)</script>"
NASTY = 'a|b & 50% of_$x^2 {#1} "quoted", ~\\'
METRICS = ("hit@1", "ndcg@1", "ndcg@5")


def cell(label: str, share: float | None = None, *, seed: int = 1, protocol: str = "sampled", **changes: Any) -> Cell:
    """Ranks of 300 users, the first with probability ``share``."""
    fields: dict[str, Any] = {"model": "Model", "command": f"run --seed={seed} > '{SCRIPT}'", "commit": "0123abc"}
    if share is not None:
        rng = np.random.default_rng(seed)
        ranks = np.where(rng.random(300) < share, 1, rng.integers(2, 21, 300)).tolist()
        cold = {"users": 90, **metrics.metrics(ranks[:90], METRICS), "half_width_95": metrics.half_widths(ranks[:90], METRICS)}
        fields["record"] = {
            "model": "Model",
            "results": {"Model": metrics.metrics(ranks, METRICS)},
            "slices": {"Model": {"cold": cold}},
            "ranks": {"Model": {f"u{user}": rank for user, rank in enumerate(ranks)}},
            "candidates_sha256": {"test": "a" * 64},
            "passport": {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)},
            "protocol": {"mask_history": None},
            "seconds": {"train": 1000 * share},
            "trained_parameters": 1_234_567,
        } | changes.pop("facts", {})
    return Cell(label=label, seed=seed, protocol=protocol, **fields | changes)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return build(
        [
            *(cell(SCRIPT, 0.6, seed=seed, facts={"backbone": "builtin <2M>"}) for seed in (1, 2, 3)),
            cell(NASTY, 0.1, note=f"lr in {SCRIPT}"),
            cell("Middle", 0.35),
            cell("Broken", error=f"no memory {SCRIPT}"),
            cell("Later"),
            cell("Bare", 0.2, facts={"slices": None, "seconds": None}),
            cell("Alone", 0.4, protocol="full & all"),
        ],
        title=f"ml-100k {SCRIPT}",
    )


@pytest.fixture(scope="module")
def page(board: Leaderboard) -> str:
    return pages.to_html(board)


def test_json_is_strict_and_comes_back_as_it_was(board: Leaderboard) -> None:
    text = to_json(board)
    assert from_json(text) == board and json.loads(text) == asdict(board)
    assert "u17" not in text  # nothing of a single user
    assert from_json(to_json(build([]))) == build([])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tables": [{}]}', '{"tables": [], "other": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the content of a leaderboard.json"):
        from_json(text)


def test_markdown_rows_are_whole_and_escaped(board: Leaderboard) -> None:
    text = formats.to_markdown(board)
    for part, rows in zip(text.split("\n## ")[1:], (6, 1), strict=True):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + rows and len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1  # columns of each
    assert r"a\|b &amp; 50% of\_$x^2" in text and "<script" not in re.sub(r"\\<", "", text)
    assert re.search(r"\| a +\| \\<script.* \*\*0\.\d{4}\*\* ±0\.\d{3}<sup>bcd</sup> \|", text)
    assert r"Broken (seed 1 failed: no memory \<script\>alert(1)\</script\>)" in text and "Later (seed 1 has not run)" in text
    assert "ndcg@1" not in text and "over 6 tests" in text and "smallest detectable difference" in text and "1.2 M" in text


def test_csv_holds_the_numbers_and_quotes(board: Leaderboard) -> None:
    lines = list(csv.DictReader(io.StringIO(formats.to_csv(board))))
    by_label = {line["label"]: line for line in lines}
    assert len(lines) == 7 and by_label[NASTY]["note"] == f"lr in {SCRIPT}"
    top = board.tables[0].rows[0]
    assert float(by_label[SCRIPT]["hit@1"]) == top.metrics["hit@1"] and by_label[SCRIPT]["beats"] == "b c d"
    assert float(by_label[SCRIPT]["hit@1 half_width"]) == top.half_width["hit@1"] and by_label["Middle"]["hit@1 half_width"] == ""
    assert float(by_label[SCRIPT]["hit@1 cold"]) == top.slices["cold"].metrics["hit@1"] and by_label["Bare"]["hit@1 cold"] == ""
    assert by_label["Broken"]["hit@1"] == "" and by_label["Broken"]["troubles"] == f"seed 1 failed: no memory {SCRIPT}"


def test_latex_is_escaped_booktabs(board: Leaderboard) -> None:
    text = formats.to_latex(board)
    assert r"a\textbar{}b \& 50\% of\_\$x\textasciicircum{}2 \{\#1\} \textquotedbl{}quoted\textquotedbl{}, " in text
    assert r"\textasciitilde{}\textbackslash{}" in text and r"\textless{}script\textgreater{}" in text
    assert re.search(r"\\textbf\{0\.\d{4}\} \$\\pm\$0\.\d{3}\\textsuperscript\{bcd\}", text)
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{(\w+)\}", part)
        rows = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert columns and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns[1])}
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2 and text.count("{") == text.count("}")


def test_the_page_shows_foreign_text_as_text_and_asks_for_nothing(page: str) -> None:
    assert page.count("<script>") == 1 and html.escape(SCRIPT) in page  # the page's own
    page = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)  # names, not addresses
    assert not re.search(r"https?:|//\w|\ssrc=|url\((?!#)|href=\"(?!#)|@import|<link|<!--|<image", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r"\son\w+=", page)


def test_the_page_has_plot_slices_failures_and_the_command_and_commit_of_each_cell(board: Leaderboard, page: str) -> None:
    assert page.count("<svg") == 3  # accuracy against cost, but not of one row alone; and slices of both tables
    assert len(re.findall(r">0\.\d{4}( ±0\.\d{3})?</text>", page)) == 8  # bars: four rows with a slice
    details = page.count("<details")
    assert details == sum(len(table.rows) for table in board.tables) == 7
    assert page.count("<pre>run --seed=") == page.count("commit 0123abc") == 9
    assert "seed 1 failed: no memory &lt;script&gt;" in page and "seed 1 has not run" in page
    assert page.count('aria-sort="descending"') == 2 and "builtin &lt;2M&gt;" in page and "&lt; .001" in page


def test_labels_of_the_plot_cover_each_other_nowhere() -> None:
    rng = np.random.default_rng(3)
    facts = [{"seconds": {"train": float(10 ** rng.uniform(1, 3))}} for _ in range(16)]
    crowd = build([cell(f"Model number {place}", 0.3, seed=place, facts=facts[place]) for place in range(16)], flips=10)
    picture = pages.cost_picture(crowd.tables[0])
    assert picture is not None
    places = re.findall(r'<text [^>]*x="(\S+)" y="(\S+)"[^>]*>Model number \d+</text>', picture)
    lefts, heights = {left for left, _ in places}, sorted(float(top) for _, top in places)
    assert len(places) == 16 and len(lefts) == 1 and min(np.diff(heights)) > 10  # the size of the font
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', picture)[0])
    assert float(lefts.pop()) < width and heights[0] >= 8 and heights[-1] <= height


def test_any_label_can_stand_in_a_picture(recwarn: pytest.WarningsRecorder) -> None:
    labels = ["电影 模型", "a]]> -- <!-- &amp; $x$ \x07 \\frac{", "two\nlines", "x" * 80]
    table = build([cell(label, 0.3, seed=place) for place, label in enumerate(labels)], flips=10).tables[0]
    for picture in (pages.cost_picture(table), pages.slice_picture(table)):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture or "")
        assert {html.escape(label, quote=False) for label in labels[:2]} | {"two lines", "x" * 39 + "…"} <= set(texts)
        assert "<!--" not in (picture or "")
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_a_picture_follows_the_colours_of_the_page_and_is_the_same_each_time(board: Leaderboard) -> None:
    picture = pages.slice_picture(board.tables[0])
    assert picture is not None and picture == pages.slice_picture(board.tables[0])
    assert {"var(--ink)", "var(--llm)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", picture))
    assert not set(re.findall(r"#[0-9a-f]{6}\b(?=[;\"])", picture)) - {"#000000"}
    assert html.escape(SCRIPT, quote=False) in picture and "<script" not in picture and "of_$x^2" in picture


def test_numbers_as_people_read_them() -> None:
    assert [formats.duration(seconds) for seconds in (0, 4.25, 42, 119, 150, 3599, 7200, 400_000)] == [
        "0 s",
        "4.2 s",
        "42 s",
        "119 s",
        "2.5 min",
        "60 min",
        "2 h",
        "111 h",
    ]
    assert [formats.amount(value) for value in (0, 999, 1234, 1.3e6, 7e9)] == ["0", "999", "1.2 k", "1.3 M", "7 B"]
    assert formats.amount(2.13e9, "B") == "2.1 GB"


def test_all_files_are_written(board: Leaderboard, tmp_path: Path) -> None:
    paths = write_all(board, tmp_path / "new")
    assert [path.name for path in paths] == [f"leaderboard.{ending}" for ending in ("json", "md", "csv", "tex", "html")]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths) and all(path.stat().st_size > 0 for path in paths)
    assert from_json(paths[0].read_text(encoding="utf-8")) == board


@pytest.mark.parametrize("cells", [[], [cell("Broken", error="x")], [cell("Empty", 0.3, facts={"results": {}})], [cell("Later")]])
def test_little_or_nothing_is_still_a_page(cells: list[Cell], tmp_path: Path) -> None:
    assert all(path.stat().st_size for path in write_all(build(cells), tmp_path))


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
  const found = {start: shown(), metric: press(1), again: press(1), name: press(0), seeds: press(heads.length - 2)};
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


def browse(page: Path, *options: str) -> tuple[str, str]:
    """What a headless browser prints of a page, and what it logs; only consoles log when all is well."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on this machine")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={page.parent / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_a_browser_sorts_by_header_and_logs_no_error(page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    printed, console = browse(file, "--dump-dom", "--virtual-time-budget=3000", "--window-size=500,900")
    assert console == ""
    told = re.search(r"found(\{.*\})end", printed)
    assert told, printed[:2000]
    found = json.loads(html.unescape(told[1]))
    best_first = [SCRIPT, "Middle", "Bare", NASTY]
    assert found["start"][:4] == best_first and set(found["start"][4:]) == {"Broken", "Later"}
    assert found["metric"]["rows"][:4] == best_first[::-1] and set(found["metric"]["rows"][4:]) == {"Broken", "Later"}
    assert found["metric"]["sorted"][1] == "ascending" and found["again"]["sorted"][1] == "descending"
    assert found["again"]["rows"][:4] == best_first
    assert found["name"]["sorted"][:2] == ["ascending", None]
    assert [label for label in found["name"]["rows"] if label.isalpha()] == ["Bare", "Broken", "Later", "Middle"]
    assert found["seeds"]["rows"][0] == SCRIPT  # three of them
    assert found["open"] == "t1r1" and not found["wider"] and found["scripts"] == 2  # a link opens its details; no sideways page


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
