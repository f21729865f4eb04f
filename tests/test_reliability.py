"""The parts of ``benchmarks/reliability.py`` in small, and its page."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import reliability
from faults import damages, disk, hostile, inputs, kills, strategies
from faults.page import page
from faults.world import Outcome, World, record
from tqdm import tqdm

from recbole_llm.registry import MODELS

ROOT = Path(__file__).resolve().parent.parent
FEW = dict.fromkeys(("chat templates", "leaderboard files", "atomic files", "titles of up to 100,000 characters"), 8)  # dear ones


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_the_page_is_what_its_json_renders_to() -> None:
    sections = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == page(sections)
    assert all(set(reliability.KEYS) <= set(part) for part in sections.values())


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_hostile_inputs_are_read_or_refused_in_one_line(kind: str, world: World) -> None:
    strategy, read = inputs.KINDS[kind](world)
    number = FEW.get(kind, 20)
    found = hostile.tried(strategy, read, number)
    assert found.counts.total() >= number


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RecursionError("x")])
def test_an_error_that_nobody_raised_for_the_user_is_a_loss(error: Exception) -> None:
    def read(value: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        hostile.tried(strategies.texts, read, 1)
    logging.disable(logging.NOTSET)


def test_how_a_damage_is_judged() -> None:
    file = Path("saved/stages/ingredient-12/adapter_model.safetensors")
    said = Outcome(0, 1.0, "ingredient-12: its SHA-256 is not the one; it is computed again")
    named = Outcome(2, 1.0, f"error: {file} is damaged\n")
    assert damages.judged(said, 1, 1, file) == damages.REBUILT and damages.judged(said, 2, 1, file) == damages.LOST
    assert damages.judged(Outcome(0, 1.0, ""), 1, 1, file) == damages.UNREAD
    assert damages.judged(named, None, 1, file) == damages.NAMED
    assert damages.judged(Outcome(2, 1.0, "error: something\n"), None, 1, file) == damages.LOST
    assert damages.judged(Outcome(2, 1.0, f"Traceback\nerror: {file}\n"), None, 1, file) == damages.LOST
    assert damages.judged(Outcome(-9, 1.0, ""), None, 1, file) == damages.LOST


def test_a_command_that_is_killed_while_it_writes_a_line_stops_no_later_one(world: World, tmp_path: Path) -> None:
    def killed() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert world.run(["--version"], tmp_path, killed).code == -signal.SIGKILL
    assert world.start(["--version"], tmp_path, lambda: tqdm.get_lock().acquire()).wait(60).code == 0


def test_what_a_command_writes_is_read_while_it_runs(world: World, tmp_path: Path) -> None:
    ended = world.start(["--version"], tmp_path, lambda: print("x" * 2**22)).wait(60)
    assert ended.code == 0 and len(ended.text) > 2**22


def test_what_killed_runs_leave_is_found(tmp_path: Path) -> None:
    for name in (".a.lock", "a", ".a.owner", ".a-1.unfinished/curve.jsonl"):
        (file := tmp_path / "stages" / name).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert kills.left_over(tmp_path) == ["stages/.a-1.unfinished", "stages/.a.owner"]


def test_times_of_a_record_and_of_its_parts_are_not_compared(tmp_path: Path) -> None:
    (file := tmp_path / "runs" / "a" / "record.json").parent.mkdir(parents=True)
    points = [{"value": 0.5, "cpu_seconds": 1.0}]
    file.write_text(json.dumps({"seconds": 1.0, "ranks": {"a": {"u": 1}}, "routing": {"points": points, "users_per_second": 2}}))
    assert record(tmp_path) == {"ranks": {"a": {"u": 1}}, "routing": {"points": [{"value": 0.5}]}}


def test_every_model_is_killed() -> None:
    assert set(MODELS) <= set(kills.MODELS)


@pytest.mark.slow
def test_the_parts_run_on_one_model(tmp_path: Path) -> None:
    """Each in small: nothing is lost, and the page has a row for each."""
    out = tmp_path / "reliability.json"
    small = ["--models=Pop", "--kills=1", "--restarts=1", "--damages=4", "--disks=2", f"--out={out}"]
    assert reliability.main(["kills", "damages", "disk", *small]) == 0
    sections = json.loads(out.read_text())
    assert sections["kills"]["rows"][0][:1] + sections["kills"]["rows"][0][2:] == ["Pop", 1, 1, 0]
    assert sections["damages"]["rows"][-1][1] == 4 and sections["damages"]["rows"][-1][-1] == 0
    assert sections["disk"]["rows"][-1][4] == 0
    assert out.with_suffix(".md").read_text().count("\n## ") == 3


def test_a_section_of_another_benchmark_is_added(tmp_path: Path) -> None:
    out, given = tmp_path / "reliability.json", tmp_path / "load.json"
    section = {"part": "load", "title": "Load", "columns": ["a"], "rows": [[1]], "notes": ["n"], "command": "c", "machine": "m"}
    given.write_text(json.dumps(section))
    with pytest.raises(SystemExit, match="date"):
        reliability.main([f"--add={given}", f"--out={out}"])
    given.write_text(json.dumps({**section, "date": "2026-11-26"}))
    assert reliability.main([f"--add={given}", f"--out={out}"]) == 0
    assert "## Load\n\n| a |\n| --- |\n| 1 |\n\n- n\n\nm, 2026-11-26: `c`\n" in out.with_suffix(".md").read_text()


def test_a_disk_that_fails_from_a_write_on_ends_in_one_line(tmp_path: Path) -> None:
    assert disk.judged(Outcome(0, 1.0, ""), 1, 1) == disk.SURVIVED and disk.judged(Outcome(0, 1.0, ""), 2, 1) == disk.LOST
    assert disk.judged(Outcome(2, 1.0, "error: saved: full; free some\n"), None, 1) == disk.ONE_LINE
    assert disk.judged(Outcome(1, 1.0, "Traceback ...\n"), None, 1) == disk.LOST
