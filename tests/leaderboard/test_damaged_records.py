"""A leaderboard shows no figure of a damaged record: it names the record and runs it again, and fails if that fails."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm import cli
from recbole_llm.leaderboard import runner, tuning
from recbole_llm.leaderboard.board import make_leaderboard
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.leaderboard.table import Leaderboard
from recbole_llm.leaderboard.task import Task
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.json_files import CHECKSUM, sealed


@pytest.fixture
def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "epochs")}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are made in this process; their models are listed."""
    models: list[str] = []

    def run(arguments: list[str], log: Path, threads: int) -> None:
        model = arguments[0].removeprefix("--model=")
        models.append(model)
        run_recbole_llm(model, "tiny", cmd_line=arguments[2:])

    monkeypatch.setattr(runner, "run_process", run)
    return models


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "board.yaml"
    file.write_text(
        yaml.safe_dump({"dataset": "tiny", "seeds": [1], "models": {"Pop": {}, "BPR": {}}, "shortcuts": False}, sort_keys=False)
    )
    return file


def edited(task: Task, score: float = 0.99) -> None:
    """An edit by hand of someone who takes away the checksum, too."""
    record = json.loads(task.record.read_text())
    del record[CHECKSUM]
    record["results"][task.model]["hit@1"] = score
    task.record.write_text(json.dumps(record))


def cells(board: Leaderboard) -> dict[str, str]:
    return {row.label: row.cells[0].status for row in board.tables[0].rows}


def test_an_edited_figure_is_not_shown_and_its_run_is_repeated(
    given: dict[str, Any], plan: Path, started: list[str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="no run has a record below checkpoint_dir; leave --show out"):
        make_leaderboard(plan, given, show=True)
    before, _ = make_leaderboard(plan, given)
    assert started == ["Pop", "BPR"] and not before.failed
    pop, _ = read_plan(plan, given)
    edited(pop)
    shown, _ = make_leaderboard(plan, given, show=True)
    assert cells(shown) == {"BPR": "done", "Pop": "failed"} and shown.tables[0].rows[1].metrics == {}
    (trouble,) = shown.tables[0].rows[1].troubles
    assert (
        "record.json contradicts itself: hit@1 of Pop is 0.99, and 0." in trouble and "without --show it is run again" in trouble
    )
    options = [f"--{key}={value}" for key, value in given.items()]
    with pytest.raises(SystemExit) as exit:
        cli.main(["leaderboard", f"--config_files={plan}", "--show", *options])
    assert exit.value.code == 1 and "contradicts itself" in capsys.readouterr().out
    again, _ = make_leaderboard(plan, given)
    assert started == ["Pop", "BPR", "Pop"] and again.tables[0].rows[0].metrics == before.tables[0].rows[0].metrics
    assert f"Pop, seed 1: {pop.record} contradicts itself" in caplog.text and "it is run again" in caplog.text
    make_leaderboard(plan, given)
    assert started == ["Pop", "BPR", "Pop"], "it is sound again"


def test_a_record_of_other_code_is_shown_with_a_note_and_its_run_repeated(
    given: dict[str, Any], plan: Path, started: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before, _ = make_leaderboard(plan, given)
    pop, bpr = read_plan(plan, given)
    record = json.loads(pop.record.read_text())
    for older in ({**record, "code": "0" * 64}, {key: value for key, value in record.items() if key != "code"}):
        pop.record.write_text(sealed(older))
        shown, _ = make_leaderboard(plan, given, show=True)
        notes = {row.label: row.note for row in shown.tables[0].rows}
        assert notes == {"BPR": None, "Pop": "written by other code, and run again without --show (seed 1)"}
        assert cells(shown) == {"BPR": "done", "Pop": "done"}
        del started[:]
        again, _ = make_leaderboard(plan, given)
        assert started == ["Pop"] and not any(row.note for row in again.tables[0].rows)
        assert f"{pop.record} was written by other code; it is run again" in caplog.text


def test_a_record_of_data_that_have_changed_is_shown_with_a_note_and_its_run_repeated(
    given: dict[str, Any], plan: Path, started: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the name of the run on the new data, since settings alone name it."""
    shutil.copytree(Path(given["data_path"]) / "tiny", tmp_path / "data" / "tiny")
    given, file = given | {"data_path": str(tmp_path / "data")}, tmp_path / "data" / "tiny" / "tiny.inter"
    make_leaderboard(plan, given)
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    shown, _ = make_leaderboard(plan, given, show=True)
    assert {row.note for row in shown.tables[0].rows} == {"tiny.inter changed since"}
    del started[:]
    again, _ = make_leaderboard(plan, given)
    assert started == ["Pop", "BPR"] and not any(row.note for row in again.tables[0].rows)
    assert "record.json is of other data: tiny.inter changed since; it is run again" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", '{"results": '])
def test_a_damaged_record_fails_with_its_own_row_where_the_run_fails_again(
    content: str, given: dict[str, Any], plan: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_leaderboard(plan, given)
    pop, _ = read_plan(plan, given)
    pop.record.write_text(content)
    monkeypatch.setattr(runner, "run_process", lambda *_: "out of memory")
    board, _ = make_leaderboard(plan, given)
    assert cells(board) == {"BPR": "done", "Pop": "failed"} and board.failed == 1
    assert board.tables[0].rows[1].troubles == ["seed 1 failed: out of memory"]


def test_the_record_of_one_run_does_not_stand_for_another(given: dict[str, Any], plan: Path, started: list[str]) -> None:
    """One seed's record copied over another's would make an interval of 0."""
    make_leaderboard(plan, given)
    pop, _ = read_plan(plan, given)
    other = Task("Pop", "Pop", "tiny", 2, "candidates", pop.settings)
    other.record.parent.mkdir()
    other.record.write_bytes(pop.record.read_bytes())
    assert pop.is_done and not other.is_done and "is the record of a run with other settings" in str(other.damage)
    assert other.cell().status == "failed"


def test_a_search_reads_no_damaged_score(given: dict[str, Any], tmp_path: Path, started: list[str]) -> None:
    (tmp_path / "space.hyper").write_text("learning_rate choice [0.01]\n")
    arguments = [f"--{key}={value}" for key, value in given.items()]
    first = tuning.tune("BPR", "tiny", params_file=tmp_path / "space.hyper", arguments=arguments)
    (record,) = Path(given["checkpoint_dir"]).glob("runs/*/record.json")
    content = json.loads(record.read_text())
    content["best_valid_result"]["ndcg@5"] = 0.99
    record.write_text(json.dumps(content))
    (journal,) = Path(given["checkpoint_dir"]).rglob("study.journal")
    journal.unlink()
    again = tuning.tune("BPR", "tiny", params_file=tmp_path / "space.hyper", arguments=arguments)
    assert started == ["BPR", "BPR"] and again.trials[0].score == first.trials[0].score != 0.99
