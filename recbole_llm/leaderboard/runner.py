"""Run the tasks of a leaderboard, each in a process of its own, several in parallel.

A task with a sound record of this code and data is not run, so a killed leaderboard resumes and only added models are run. A
record that is damaged, or of other code or data, is named, and its run repeated. Tasks that differ in the row share one run. A
failed task does not stop the others; Ctrl-C stops all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.leaderboard.task import Task
from recbole_llm.store.progress import Bar, progress_bar

logger = getLogger()
LOOK_EVERY = 2  # seconds between two looks at the logs of the runs under way
WORKERS = 2  # of submitit, one after another, that take up a run; one that dies twice most likely dies of the run
_stops: set[Callable[[], Any]] = set()  # each ends a run that is under way


def run_tasks(
    tasks: Sequence[Task], logs: Path, *, jobs: int = 1, engine: str = "process", show_progress: bool = True
) -> dict[Task, str]:
    """Run the tasks without a sound record of this code and data; returns the reason for each failed task.

    Args:
        logs: folder for the output of the runs and the files of submitit.
        jobs: number of parallel runs, which share the cores.
        engine: ``process`` (subprocesses), or ``slurm`` or ``local`` (submitit, which must be installed).

    Raises:
        ValueError: an unknown engine, or fewer than one job.
        ImportError: submitit is not installed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs={jobs}: must be at least 1")
    reasons: dict[Task, str] = {}
    waiting: dict[Path, list[Task]] = {}  # by record
    missing = []
    for task in tasks:
        try:
            if task.record not in waiting and not task.is_current:
                missing.append(waiting.setdefault(task.record, []))
            waiting.setdefault(task.record, []).append(task)
        except Exception as error:  # whatever it is, it is the task's alone
            reasons[task] = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    for first, *_ in missing:
        fault = first.damage or (first.outdated if first.is_done else None)
        if fault:
            logger.warning(f"{first.label}, seed {first.seed}: {fault}; it is run again")
    logger.info(f"leaderboard: {len(waiting)} runs, {len(waiting) - len(missing)} of them cached")
    by_first = {shared[0]: shared for shared in missing}
    with progress_bar("leaderboard", len(missing), show=show_progress) as bar:
        for first, reason in run_each([*by_first], logs, bar, jobs=jobs, engine=engine):
            if reason or not first.is_done:
                reasons |= dict.fromkeys(by_first[first], reason or first.damage or "the run ended without a record")
                logger.warning(f"{first.label}, seed {first.seed}: {reasons[first]}")
            bar.advance()
    return reasons


def run_each(
    tasks: Sequence[Task], logs: Path, bar: Bar, *, jobs: int = 1, engine: str = "process"
) -> Iterator[tuple[Task, str | None]]:
    """Run tasks, and yield each when it ends, with the reason if it failed; ``bar`` tells meanwhile what the others do.

    The other arguments are as in :func:`run_tasks`.
    """
    for task in tasks:  # RecBole's way of creating folders fails if two runs do it at once
        for folder in (Path("log") / task.config["model"], task.record.parents[2]):
            folder.mkdir(parents=True, exist_ok=True)
    start = _engine(engine, logs, threads=threads_each(jobs))
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(start, task): task for task in tasks}
        try:
            for done in _finished(running, logs, bar):
                yield running[done], done.result()
        except BaseException:  # Ctrl-C: the pool would start what waits and end with the last run
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(run.done() for run in running):
                for stop in list(_stops):
                    stop()
                wait([run for run in running if not run.done()], timeout=0.1)
            raise


def threads_each(jobs: int) -> int:
    """Threads of each of ``jobs`` processes: the user's ``OMP_NUM_THREADS``, or an equal share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))


def run_process(arguments: Sequence[str], log: Path, threads: int) -> str | None:
    """Run in a process of its own, which measures its peak memory; returns the reason if it fails, else None."""
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "recbole_llm.cli", *arguments]
        with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | settings) as process:
            _stops.add(process.terminate)
            try:
                code = process.wait()
            finally:
                _stops.discard(process.terminate)
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error: ")] or lines[-1:] or [f"exit code {code}"]
    return f"{reasons[-1].removeprefix('error: ')} ({log})" if code > 0 else f"killed by signal {-code} ({log})"


def _finished(running: Mapping[Future, Task], logs: Path, bar: Bar) -> Iterator[Future]:
    """The runs as they end; meanwhile the bar tells what the others do."""
    left = set(running)
    while left:
        done, left = wait(left, timeout=LOOK_EVERY, return_when=FIRST_COMPLETED)
        yield from done
        under_way = [running[run] for run in left if run.running()]
        if news := [f"{task.label}: {line}" for task in under_way if (line := _last_line(_log(task, logs)))]:
            bar.tell("; ".join(sorted(news)))


def _log(task: Task, logs: Path) -> Path:
    return logs / f"{task.record.parent.name}.log"


def _last_line(log: Path) -> str:
    """The last message of a log, without its time and level; empty if there is none yet."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    whole = [line for line in lines[:-1] if line.strip()]  # the last one may be half written
    return re.sub(r"^\d\d \w{3} \d\d:\d\d +\w+ +", "", whole[-1]).strip() if whole else ""


def _engine(name: str, logs: Path, threads: int) -> Callable[[Task], str | None]:
    def given(task: Task) -> tuple[list[str], Path, int]:
        return task.arguments, _log(task, logs), threads

    if name == "process":
        return lambda task: run_process(*given(task))
    if name not in ("local", "slurm"):
        raise ValueError(f"--engine={name}: known: process, local, slurm")
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ImportError(f"--engine={name} needs submitit: pip install submitit") from error
    logs = logs.absolute()
    executor: Any = submitit.AutoExecutor(folder=logs / "submitit", cluster=name)
    executor.update_parameters(name="leaderboard", timeout_min=24 * 60, cpus_per_task=threads)

    def submit(task: Task) -> str | None:
        stopped: list[bool] = []
        reason = None
        for _ in range(WORKERS):
            job = executor.submit(run_process, *given(task))

            def stop(job: Any = job) -> None:
                stopped.append(True)
                job.cancel()

            _stops.add(stop)
            try:
                return job.result()
            except Exception as error:  # such as preemption, a time limit or a lost node
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]} ({job.paths.stderr})"
                if stopped or not isinstance(error, submitit.core.utils.UncompletedJobError):
                    break
                logger.warning(f"{task.label}, seed {task.seed}: its worker died; another one resumes its run ({reason})")
            finally:
                _stops.discard(stop)
        return reason

    return submit
