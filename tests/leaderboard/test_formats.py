"""The leaderboard as JSON, Markdown, CSV and LaTeX: nothing lost, nothing injected."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from recbole_llm.leaderboard import formats
from recbole_llm.leaderboard.board import write_all
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Cell, Leaderboard, from_json, to_json
from tests.leaderboard.boards import NASTY, SCRIPT, cell


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
    assert re.search(r"\| a +\| \\<script.* \*\*0\.\d{3}\*\* ±0\.\d{3}<sup>b–d</sup> \|", text)
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
    assert re.search(r"\\textbf\{0\.\d{3}\} \$\\pm\$0\.\d{3}\\textsuperscript\{b--d\}", text)
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{(\w+)\}", part)
        rows = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert columns and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns[1])}
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2 and text.count("{") == text.count("}")


def test_all_files_are_written(board: Leaderboard, tmp_path: Path) -> None:
    paths = write_all(board, tmp_path / "new")
    assert [path.name for path in paths] == [f"leaderboard.{ending}" for ending in ("json", "md", "csv", "tex", "html")]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths) and all(path.stat().st_size > 0 for path in paths)
    assert from_json(paths[0].read_text(encoding="utf-8")) == board


@pytest.mark.parametrize("cells", [[], [cell("Broken", error="x")], [cell("Empty", 0.3, facts={"results": {}})], [cell("Later")]])
def test_little_or_nothing_is_still_a_page(cells: list[Cell], tmp_path: Path) -> None:
    assert all(path.stat().st_size for path in write_all(build(cells), tmp_path))


def test_no_text_of_the_csv_is_a_formula() -> None:
    """As spreadsheets read it: quotes of the CSV do not protect."""
    texts = ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", " =1"]
    board = build([cell(text, 0.3, note=text, facts={"backbone": text}) for text in texts])
    lines = list(csv.DictReader(io.StringIO(formats.to_csv(board))))
    for line in lines:
        assert not any(value.lstrip().startswith(tuple("=+@")) for value in line.values())
        assert (
            line["label"] == f"'{line['label'][1:]}"
            and line["label"][1:] in texts
            and line["note"] == line["label"] == line["backbone"]
        )
    negative = build([cell("A", 0.3), cell("B", 0.9, facts={"shortcut": True})])
    assert [
        float(line["headroom"]) < 0 for line in csv.DictReader(io.StringIO(formats.to_csv(negative))) if line["headroom"]
    ] == [True]
