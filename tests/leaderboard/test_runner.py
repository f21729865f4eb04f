"""Runs are started once, side by side, and one that fails does not stop the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.runner import run_tasks
from recbole_llm.leaderboard.task import Task


@pytest.fixture
def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "epochs")}


def task(given: dict[str, Any], model: str = "Pop", seed: int = 1, dataset: str = "tiny", **changes: Any) -> Task:
    return Task(f"{model} {changes}", model, dataset, seed, "candidates", {**given, **changes})


@pytest.mark.slow
def test_every_run_gets_a_record_and_the_next_leaderboard_starts_none(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task(given), task(given, seed=2), task(given, dataset="nowhere"), task(given, "NoModel")]
    reasons = run_tasks(tasks, tmp_path / "logs", jobs=2, show_progress=False)
    assert tasks[0].record.is_file() and tasks[1].record.is_file()
    assert set(reasons) == {tasks[2], tasks[3]}
    assert "--dataset=nowhere" in reasons[tasks[2]] and ".log)" in reasons[tasks[2]]
    assert "--model=NoModel: no such model" in reasons[tasks[3]]
    before = tasks[0].record.stat().st_mtime_ns
    monkeypatch.setattr(runner, "run_process", lambda *_: pytest.fail("a run that is kept was started again"))
    assert run_tasks(tasks[:2], tmp_path / "logs", show_progress=False) == {}
    assert tasks[0].record.stat().st_mtime_ns == before


def test_rows_of_one_run_start_it_once_and_fail_together(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def refuse(arguments: list[str], log: Path, threads: int) -> str:
        started.append(arguments)
        return "out of memory"

    monkeypatch.setattr(runner, "run_process", refuse)
    own = task(given)
    other = Task("another row", "Pop", "tiny", 1, "candidates", own.settings, row="no adapter")
    assert run_tasks([own, other], tmp_path, show_progress=False) == {own: "out of memory", other: "out of memory"}
    assert started == [own.arguments]


@pytest.mark.parametrize(("given_threads", "expected"), [("", 2), ("1", 1), ("5", 5)])
def test_parallel_runs_share_the_cores_unless_the_user_says_otherwise(
    given_threads: str, expected: int, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", given_threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(runner, "run_process", lambda arguments, log, threads: seen.append(threads))
    run_tasks([task(given, seed=seed) for seed in range(4)], tmp_path, jobs=3, show_progress=False)
    assert seen == [expected] * 4


def test_an_interruption_ends_the_run_under_way_and_starts_no_other(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, python = tmp_path / "started", tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho run >> {started}\nexec tail -f /dev/null\n")
    python.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(python))

    def interrupt(*_: Any) -> None:
        while not started.exists():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_finished", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task(given, seed=seed) for seed in (1, 2, 3)], tmp_path / "logs", show_progress=False)
    assert started.read_text() == "run\n" and not runner._stops


def test_the_bar_tells_what_the_runs_under_way_do(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK_EVERY", 0)
    tasks = {Future(): task(given, seed=seed) for seed in (1, 2)}
    first, second = tasks
    first.set_running_or_notify_cancel()  # the other one waits for its turn
    for one in tasks.values():
        lines = "27 Nov 05:20    INFO  ingredient: 5/100, 30 s left\n27 Nov 05:21    INFO  ingredient: 90/1"
        runner._log(one, tmp_path).write_text(lines)
    told: list[str] = []

    class Watched:
        def tell(self, news: str) -> None:
            told.append(news)
            first.set_result(None)
            second.set_result(None)

    assert set(runner._finished(tasks, tmp_path, Watched())) == {first, second}
    assert told == ["Pop {}: ingredient: 5/100, 30 s left"]


@pytest.mark.slow
def test_killed_and_started_again_no_finished_run_is_lost_or_repeated(given: dict[str, Any], tmp_path: Path) -> None:
    tasks = [task(given, seed=seed) for seed in (1, 2, 3)]
    code = f"""
import os, signal
from pathlib import Path
from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.task import Task

run, calls = runner.run_process, []
def dying(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(*arguments)

runner.run_process = dying
tasks = [Task("Pop", "Pop", "tiny", seed, "candidates", {given!r}) for seed in (1, 2, 3)]
runner.run_tasks(tasks, Path("logs"), show_progress=False)
"""
    died = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode
    assert died == -signal.SIGKILL and [one.record.is_file() for one in tasks] == [True, False, False]
    first = tasks[0].record.stat().st_mtime_ns
    assert run_tasks(tasks, tmp_path / "logs", show_progress=False) == {}
    assert all(one.record.is_file() for one in tasks) and tasks[0].record.stat().st_mtime_ns == first


@pytest.mark.slow
def test_submitit_runs_two_local_workers(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    tasks = [task(given, seed=seed) for seed in (1, 2)]
    assert run_tasks(tasks, tmp_path / "logs", jobs=2, engine="local", show_progress=False) == {}
    assert all(one.record.is_file() for one in tasks)


@pytest.mark.parametrize(("deaths", "started"), [(0, 1), (1, 2), (2, 2)])
def test_the_run_of_a_worker_that_dies_is_taken_up_by_another_once(
    deaths: int, started: int, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    submitted: list[Path] = []

    class Job:
        paths = SimpleNamespace(stderr="job.err")

        def cancel(self) -> None: ...

        def result(self) -> None:
            if len(submitted) <= deaths:
                raise submitit.core.utils.UncompletedJobError("Job 1 has not produced any output\nsecond line")
            one.record.parent.mkdir(parents=True)
            one.record.touch()

    def submit(_: Any, function: Any, arguments: list[str], log: Path, threads: int) -> Job:
        submitted.append(log)
        return Job()

    one = task(given)
    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    monkeypatch.setattr(Task, "is_done", property(lambda self: self.record.is_file()))
    reasons = run_tasks([one], tmp_path, engine="local", show_progress=False)
    died = "UncompletedJobError: Job 1 has not produced any output (job.err)"
    assert len(submitted) == started and reasons == ({one: died} if deaths == 2 else {}) and not runner._stops


def test_engines_and_jobs_that_are_none_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--engine=ray: known: process, local, slurm"):
        run_tasks([task(given)], tmp_path, engine="ray", show_progress=False)
    with pytest.raises(ValueError, match="--jobs=0"):
        run_tasks([task(given)], tmp_path, jobs=0, show_progress=False)
