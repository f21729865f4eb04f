"""The page of lists beside a leaderboard, to which its page links."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.leaderboard.board import make_leaderboard
from recbole_llm.look.boards import pages_of
from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture
def plan(settings: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Any], Path]:
    """A leaderboard of finished runs in two protocols: its file, its keys and its folder."""
    full = {"eval_args": {"mode": "full"}}
    for model, changes in (("Pop", {}), ("BPR", {}), ("Pop", full)):
        run_recbole_llm(model, "tiny", config_dict={**settings, **changes})
    entries = {"most popular": {"model": "Pop"}, "BPR": {"protocols": ["candidates"]}}
    content = {"dataset": "tiny", "seeds": [2020], "protocols": {"candidates": {}, "full & all": full}, "models": entries}
    file = tmp_path / "board.yaml"
    file.write_text(json.dumps({**content, "shortcuts": False}))
    return file, settings, tmp_path / "board"


@pytest.mark.slow
def test_the_leaderboard_links_to_a_page_for_each_table(
    plan: tuple[Path, dict[str, Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    file, settings, out = plan
    board, files = make_leaderboard(file, settings, show=True, out=out, beside=pages_of(5))
    assert board.failed == 0 and [path.name for path in files[-2:]] == ["look-candidates.html", "look-full-all.html"]
    links = re.findall(r'href="([^#"]*)"', (out / "leaderboard.html").read_text())
    assert links == ["look-candidates.html", "look-full-all.html"] and all((out / link).is_file() for link in links)
    names = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', (out / links[0]).read_text())
    assert names == [row.label for row in board.tables[0].rows] and {*names} == {"most popular", "BPR"}
    one, _ = make_leaderboard(file, settings, show=True, out=out, beside=pages_of(1))
    assert re.findall(r"<bdi>(.*?)</bdi>", (out / links[0]).read_text()) == [one.tables[0].rows[0].label]
    record = LLMConfig("BPR", "tiny", config_dict=settings).record_file  # a run that cannot be loaded costs its page alone
    (record.parent.parent.parent / json.loads(record.read_text())["checkpoint"]["file"]).unlink()
    board, files = make_leaderboard(file, settings, show=True, out=out, beside=pages_of(2))
    assert "leaderboard: candidates has no page of lists: --run: the weights of" in caplog.text
    assert board.failed == 0 and files[-1].name == "look-full-all.html" and not (out / "look-candidates.html").exists()
    assert re.findall(r'href="([^#"]*)"', (out / "leaderboard.html").read_text()) == ["look-full-all.html"]


def test_no_row_is_no_page() -> None:
    with pytest.raises(ValueError, match="--look=0"):
        pages_of(0)
