"""The tables of a leaderboard within a page that someone writes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from recbole_llm.config.property_files import properties_folder
from recbole_llm.leaderboard.board import make_leaderboard
from recbole_llm.leaderboard.embedded import END, embed, with_tables
from recbole_llm.leaderboard.formats import tables_in_markdown, to_markdown
from recbole_llm.leaderboard.table import Leaderboard
from tests.test_docs import ROOT

BEGIN = "<!-- leaderboard mine: written by recbole-llm leaderboard -->"


def test_the_tables_take_the_place_of_the_earlier_ones_and_nothing_else_changes(board: Leaderboard, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\nAn é.\n\n{BEGIN}\n{END}\n\nThe end.\n", encoding="utf-8")
    for name in ("first", "second"):
        one = replace(board, tables=[replace(board.tables[0], protocol=name)])
        assert embed(page, "mine", one) == [tmp_path / "page.svg", page]
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        content, _, after = rest.partition(END)
        picture, tables = content.split(".*\n\n", 1)
        assert picture.startswith("\n\n![hit@1 of each row](page.svg)\n\n*hit@1 with 95 % intervals over users; ")
        assert (before, after) == ("# Mine\n\nAn é.\n\n", "\n\nThe end.\n")
        assert to_markdown(one).endswith(tables.strip() + "\n") and "#" not in re.sub(r"{#\d}", "", tables)
    assert "## " in tables_in_markdown(board, headings=False)  # which tells several protocols apart
    svg = (tmp_path / "page.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg style=") and "var(" not in svg and "<script" not in svg and ">hit@1<" in svg


def test_each_protocol_has_a_picture_of_its_own(board: Leaderboard, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    tables = [replace(board.tables[0], protocol=name) for name in ("a", "b")]
    assert [path.name for path in embed(page, "mine", replace(board, tables=tables))] == ["page-a.svg", "page-b.svg", "page.md"]


def test_a_page_without_a_place_is_refused_and_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN.replace('mine', 'other')}\n{END}\n")
    with pytest.raises(ValueError, match=f"--page: .*page.md has no place for the tables; .*\n{BEGIN}\n{END}"):
        with_tables(page, "mine", "")
    assert page.read_text() == f"{BEGIN.replace('mine', 'other')}\n{END}\n"
    file = tmp_path / "mine.yaml"
    file.write_text("{dataset: tiny, seeds: [1], models: {Pop: {}}}")
    with pytest.raises(ValueError, match="has no place for the tables"):
        make_leaderboard(file, {"checkpoint_dir": str(tmp_path / "saved")}, page=page)
    assert not (tmp_path / "saved").exists(), "a run was started"


def test_the_pages_of_results_name_leaderboards_that_there_are() -> None:
    marks = [re.findall(r"<!-- leaderboard (\S+): written by", page.read_text()) for page in (ROOT / "docs/results").glob("*.md")]
    assert {name for found in marks for name in found} <= {file.stem for file in properties_folder().glob("leaderboard/*.yaml")}
