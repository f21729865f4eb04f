"""Hyper-parameter search with Optuna: a search file in, a property file of the best settings out.

Each evaluation is an ordinary run whose record is cached. Of a record, only the validation score is read: the test's decides
nothing and is not shown. The study is a journal on disk, to which a run is added when it has ended. So a search that was killed
resumes with the settings that it was evaluating, and several processes may share one: each claims a run by a lock.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from tabulate import tabulate

from recbole_llm.config import LLMConfig
from recbole_llm.config.key_groups import ABOUT_DATA
from recbole_llm.config.values import read_arguments
from recbole_llm.leaderboard.plan import Task
from recbole_llm.leaderboard.runner import run_process
from recbole_llm.leaderboard.space import Space, distribution, read_space
from recbole_llm.store.files import atomic_write, fingerprint

logger = getLogger()

ALGORITHMS = ("exhaustive", "random", "bayes")


@dataclass(frozen=True)
class Trial:
    """Settings that were evaluated, with their validation score, or why they failed."""

    settings: dict[str, Any]
    score: float | None
    error: str = ""


@dataclass(frozen=True)
class TuningResult:
    """What a search has found.

    Attributes:
        trials: all settings, the best first, failed ones last.
        metric: the validation metric that decided.
        note: search space and budget, as a leaderboard shows them beside the row.
        file: the property file of the best settings.
    """

    trials: list[Trial]
    metric: str
    note: str
    file: Path

    @property
    def best(self) -> dict[str, Any]:
        """The best settings."""
        return self.trials[0].settings

    def table(self) -> str:
        """All settings and their scores as plain text."""
        keys = list(self.best)
        rows = [
            [*(one.settings[key] for key in keys), one.error if one.score is None else f"{one.score:.4f}"] for one in self.trials
        ]
        return tabulate(rows, headers=[*keys, f"valid {self.metric}"], disable_numparse=True)


def tune(
    model: str,
    dataset: str,
    *,
    params_file: Path,
    config_files: Sequence[str] = (),
    algo: str = "exhaustive",
    max_evals: int | None = None,
    seeds: Sequence[int] | None = None,
    output_file: Path | None = None,
    arguments: Sequence[str] = (),
) -> TuningResult:
    """Search, or resume a search; writes the property file of the best settings.

    Args:
        params_file: what is searched, as :func:`read_space` reads it.
        algo: ``exhaustive`` (every combination), ``random``, or ``bayes`` (tree-structured Parzen estimator).
        max_evals: how many settings ``random`` and ``bayes`` evaluate, 10 by default.
        seeds: with which each setting is run; its score is their mean. By default the seed of the configuration alone.
        output_file: by default ``<checkpoint_dir>/tuning/<dataset>/<Model>.yaml``.
        arguments: ``--key=value`` for every run.

    Raises:
        ValueError, FileNotFoundError: a mistake in a file or an option, or every run failed.
        ImportError: optuna is not installed.
    """
    space = read_space(params_file)
    config = LLMConfig(model, dataset, config_files, cmd_line=arguments)
    settings = {key: value for key, value in read_arguments(arguments).items() if key != "seed"}
    task = Task(model, model, dataset, config["seed"], "search", settings, config_files=tuple(config_files))
    if seeds is not None and (not isinstance(seeds, (list, tuple)) or not seeds or not all(type(seed) is int for seed in seeds)):
        raise ValueError(f"--seeds={seeds}: give a list of whole numbers, as [2020, 2021]")
    folder = Path(config["checkpoint_dir"]) / "tuning" / dataset
    search = Search(task, space, algo=algo, max_evals=max_evals, seeds=seeds or [config["seed"]], folder=folder)
    search.run()
    result = TuningResult(search.trials, config["valid_metric"], search.note, output_file or folder / f"{config['model']}.yaml")
    options = {"config_files": " ".join(config_files), "params_file": params_file, "algo": algo, "max_evals": max_evals}
    options |= {"seeds": seeds, "output_file": output_file}
    given = [f"--{key}={value}" for key, value in options.items() if value not in (None, "")]
    command = shlex.join(["recbole-llm", "tune", f"--model={model}", f"--dataset={dataset}", *given, *arguments])
    atomic_write(result.file, f"# {command}\n{yaml.safe_dump(search.best_properties(), sort_keys=False, width=1000)}")
    return result


class Search:
    """Runs of one model on one dataset with settings that Optuna's samplers draw; one that fails counts and does not stop it.

    Args:
        task: what every run has in common.
        folder: of the study, which is named by everything that decides about its scores and draws.

    Raises:
        ImportError: optuna is not installed.
        ValueError: an unknown algorithm, or one that does not fit the space; a damaged study.
    """

    def __init__(self, task: Task, space: Space, *, algo: str, max_evals: int | None, seeds: Sequence[int], folder: Path):
        if algo not in ALGORITHMS:
            raise ValueError(f"--algo={algo}: there is {', '.join(ALGORITHMS[:-1])} and {ALGORITHMS[-1]}")
        if max_evals is not None and max_evals < 1:
            raise ValueError(f"--max_evals={max_evals}: at least one run")
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ImportError("a search needs optuna: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self.task, self.space, self.algo = task, space, algo
        self.tasks = [replace(task, seed=seed) for seed in seeds]
        self._distributions = {key: distribution(*line) for key, line in space.items()}
        self._direction = "maximize" if task.config["valid_metric_bigger"] else "minimize"
        if algo == "exhaustive":
            for key in (key for key, (kind, _) in space.items() if kind != "choice"):
                raise ValueError(f"--algo=exhaustive: `{key}` is no choice; give it choices, or --algo=random or bayes")
            size = math.prod(len(choices.choices) for choices in self._distributions.values())
            if max_evals not in (None, size):
                raise ValueError(f"--max_evals={max_evals}: exhaustive takes all {size}; leave it out, or give --algo=random")
            max_evals = size
        self.max_evals = max_evals or 10
        identity = fingerprint([task.config.fingerprint, space, algo, list(seeds)])
        self.folder = folder / f"{task.config['model']}-{identity[:8]}"
        self._study = self._open()
        self._started = datetime.now()

    def _open(self) -> Any:
        """The study on disk; the last line of a process that was killed while it wrote is taken off."""
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        file = self.folder / "study.journal"
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(file))
        lock.acquire()
        with contextlib.ExitStack() as stack, open(file, "ab+") as journal:
            stack.callback(lock.release)
            journal.seek(0)
            journal.truncate(journal.read().rfind(b"\n") + 1)
        try:
            storage = self._optuna.storages.JournalStorage(JournalFileBackend(str(file), lock))
            return self._optuna.create_study(storage=storage, study_name="search", direction=self._direction, load_if_exists=True)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it, the runs themselves are cached") from error

    def run(self) -> None:
        """Evaluate what is missing of the budget; the same seed draws the same settings.

        Raises:
            ValueError: every run failed.
        """
        for index in range(self.max_evals):
            with contextlib.suppress(Timeout), FileLock(self.folder / f"run-{index}.lock", timeout=0):  # else another has it
                if index not in self._ended():
                    self._evaluate(index)
        if not self.trials:
            raise ValueError(f"no run of the search has ended: other processes are evaluating them ({self.folder})")
        if self.trials[0].score is None:
            raise ValueError(f"every run of the search failed; the last one: {self.trials[-1].error}")

    def _ended(self) -> set[int]:
        """Runs with a score, and those that failed since this search was started; earlier failures are tried again."""
        trials = self._study.get_trials(deepcopy=False)
        return {one.user_attrs["index"] for one in trials if one.value is not None or one.datetime_complete > self._started}

    def _evaluate(self, index: int) -> None:
        drawn = self._draw(index)
        settings = self._settings(drawn)
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        try:
            scores = [self._score(task.with_settings(settings)) for task in self.tasks]
            outcome: dict[str, Any] = {"value": float(np.mean(scores)), "user_attrs": {"index": index, "by seed": scores}}
            logger.info(f"search: {index + 1}/{self.max_evals}: {shown}: {outcome['value']:.4f}")
        except (ValueError, FileNotFoundError) as error:
            outcome = {"state": self._optuna.trial.TrialState.FAIL, "user_attrs": {"index": index, "error": str(error)}}
            logger.warning(f"search: {index + 1}/{self.max_evals}: {shown}: failed: {error}")
        trial = self._optuna.create_trial(params=drawn, distributions=self._distributions, **outcome)
        self._study.add_trial(trial)

    def _draw(self, index: int) -> dict[str, Any]:
        """Optuna's parameters of a run, from a study in memory: on disk there are ended runs alone."""
        if self.algo != "bayes":
            return self._draws[index]
        sampler = self._optuna.samplers.TPESampler(seed=self.task.seed + index)
        study = self._optuna.create_study(direction=self._direction, sampler=sampler)
        study.add_trials([one for one in self._study.get_trials() if one.value is not None])
        return study.ask(self._distributions).params

    @cached_property
    def _draws(self) -> list[dict[str, Any]]:
        """All parameters of a search whose draws do not depend on scores."""
        if self.algo == "exhaustive":
            choices = {key: list(line.choices) for key, line in self._distributions.items()}
            sampler = self._optuna.samplers.GridSampler(choices, seed=self.task.seed)
        else:
            sampler = self._optuna.samplers.RandomSampler(seed=self.task.seed)
        study = self._optuna.create_study(sampler=sampler)
        return [study.ask(self._distributions).params for _ in range(self.max_evals)]

    def _settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The values of parameters: a choice is stored as its text."""
        choices = {
            key: {repr(value): value for value in values} for key, (kind, values) in self.space.items() if kind == "choice"
        }
        return {key: choices[key][drawn[key]] if key in choices else drawn[key] for key in self.space}

    def _score(self, task: Task) -> float:
        """The validation score of a run, or of its record where there is one."""
        if not task.record.is_file():
            threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
            log = self.folder / "logs" / f"{task.record.parent.name}.log"
            if reason := run_process([*task.arguments, "--show_progress=False"], log, threads):
                raise ValueError(reason)
        record = json.loads(task.record.read_text(encoding="utf-8"))
        score = record["best_valid_result"][task.config["valid_metric"].lower()]
        if not math.isfinite(score):
            raise ValueError(f"its validation score is {score} ({task.record})")
        return score

    @property
    def trials(self) -> list[Trial]:
        """All settings, each once, the best first."""
        last = {repr(one.params): one for one in self._study.get_trials(deepcopy=False)}  # a draw may repeat one
        found = [Trial(self._settings(one.params), one.value, one.user_attrs.get("error", "")) for one in last.values()]
        sign = -1 if self._direction == "maximize" else 1
        return sorted(found, key=lambda one: math.inf if one.score is None else sign * one.score)

    @property
    def note(self) -> str:
        """Search space and budget, as a leaderboard shows them beside the row."""
        trials = self.trials
        failed = sum(one.score is None for one in trials)
        lines = [
            f"{key} {values}" if kind == "choice" else f"{key} {kind} {values}" for key, (kind, values) in self.space.items()
        ]
        count = f"{len(trials)}" + (f" ({failed} failed)" if failed else "")
        found = f"best of {count} by validation {self.task.config['valid_metric']} ({trials[0].score:.4f})"
        seeds = ", ".join(str(task.seed) for task in self.tasks)
        return f"{found}, {self.algo} search, seed{'s' * (len(self.tasks) > 1)} {seeds}: {'; '.join(lines)}"

    def best_properties(self) -> dict[str, Any]:
        """What was given for the model, the best settings, and the note."""
        given = {key: value for key, value in self.task.settings.items() if key not in ABOUT_DATA}
        return {**given, **self.trials[0].settings, "note": self.note}
