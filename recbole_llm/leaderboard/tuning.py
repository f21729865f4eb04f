"""Hyper-parameter search with Optuna; writes a property file of the best settings.

Each evaluation is an ordinary run whose record is reused. Only the validation score of a record is read, never the test result.
The study is a journal on disk, to which a run is added when it ends, so a killed search resumes with the settings that it was
evaluating. Several processes, also of several machines, may share a search: each locks the run that it evaluates.
"""

from __future__ import annotations

import contextlib
import math
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

from recbole_llm.classical.record_code import record_code
from recbole_llm.classical.record_inputs import record_inputs
from recbole_llm.config import LLMConfig
from recbole_llm.config.key_groups import ABOUT_DATA
from recbole_llm.config.property_files import PropertyFiles, property_file, read_yaml
from recbole_llm.evaluation.recommender import Recommender
from recbole_llm.leaderboard.runner import run_each
from recbole_llm.leaderboard.space import Space, distribution, read_space
from recbole_llm.leaderboard.task import Task
from recbole_llm.store.files import atomic_write, fingerprint
from recbole_llm.store.progress import Bar, progress_bar

logger = getLogger()

ALGORITHMS = ("exhaustive", "random", "bayes")


@dataclass(frozen=True)
class Trial:
    """Evaluated settings with their validation score, or with the error of a failed run."""

    settings: dict[str, Any]
    score: float | None
    error: str = ""


@dataclass(frozen=True)
class TuningResult:
    """The result of a search.

    Attributes:
        trials: the best first, failed ones last.
        metric: the validation metric.
        note: search space and budget, which a leaderboard shows with the row.
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
        """All settings and their scores as text."""
        rows = [[*one.settings.values(), one.error if one.score is None else f"{one.score:.4f}"] for one in self.trials]
        return tabulate(rows, headers=[*self.best, f"valid {self.metric}"], disable_numparse=True)


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
    """Run or resume a search, and write the property file of the best settings.

    Args:
        params_file: the search space, as in :func:`read_space`.
        algo: ``exhaustive`` (every combination), ``random``, or ``bayes`` (tree-structured Parzen estimator).
        max_evals: number of settings that ``random`` and ``bayes`` evaluate, by default 10.
        seeds: each setting is scored by the mean over them; by default the seed of the configuration.
        output_file: by default ``<checkpoint_dir>/tuning/<dataset>/<Model>.yaml``.
        arguments: ``--key=value`` arguments of every run.

    Raises:
        ValueError, FileNotFoundError: a file or an option is invalid, or every run failed.
        ImportError: optuna is not installed.
    """
    space = read_space(params_file)
    config = LLMConfig(model, dataset, config_files, cmd_line=arguments)
    if issubclass(config.model_class, Recommender) and not config.model_class.has_validation:
        raise ValueError(f"--model={model}: it trains nothing and has no validation score that a search could compare")
    settings = {key: value for key, value in PropertyFiles().of_command_line(arguments).items() if key != "seed"}
    task = Task(model, model, dataset, config["seed"], "search", settings, config_files=tuple(config_files))
    if seeds is not None and (not isinstance(seeds, (list, tuple)) or not seeds or not all(type(seed) is int for seed in seeds)):
        raise ValueError(f"--seeds={seeds}: give a list of whole numbers, such as [2020, 2021]")
    folder = Path(config["checkpoint_dir"]) / "tuning" / dataset
    search = Search(task, space, algo=algo, max_evals=max_evals, seeds=seeds or [config["seed"]], folder=folder)
    search.check(params_file)
    search.run()
    result = TuningResult(search.trials, config["valid_metric"], search.note, output_file or folder / f"{config['model']}.yaml")
    options = {"config_files": " ".join(config_files), "params_file": params_file, "algo": algo, "max_evals": max_evals}
    options |= {"seeds": seeds, "output_file": output_file}
    given = [f"--{key}={value}" for key, value in options.items() if value not in (None, "")]
    command = shlex.join(["recbole-llm", "tune", f"--model={model}", f"--dataset={dataset}", *given, *arguments])
    atomic_write(result.file, f"# {command}\n{yaml.safe_dump(search.best_properties(), sort_keys=False, width=1000)}")
    return result


class Search:
    """A search over the settings of one model; failed runs count towards the budget and do not stop the search.

    Args:
        task: the run whose settings are varied.
        folder: the study has a subfolder named by everything that its scores and draws depend on.

    Raises:
        ImportError: optuna is not installed.
        ValueError: the algorithm is unknown or does not fit the space, or the study is damaged.
    """

    def __init__(self, task: Task, space: Space, *, algo: str, max_evals: int | None, seeds: Sequence[int], folder: Path):
        if algo not in ALGORITHMS:
            raise ValueError(f"--algo={algo}: known: {', '.join(ALGORITHMS)}")
        if max_evals is not None and max_evals < 1:
            raise ValueError(f"--max_evals={max_evals}: must be at least 1")
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
                raise ValueError(f"--algo=exhaustive: `{key}` is not a choice; make it one, or use --algo=random or bayes")
            size = math.prod(len(choices.choices) for choices in self._distributions.values())
            if max_evals not in (None, size):
                raise ValueError(f"--max_evals={max_evals}: exhaustive evaluates all {size}; remove it, or use --algo=random")
            max_evals = size
        self.max_evals = max_evals or 10
        made_of = record_code(task.config), record_inputs(task.config)  # a journal of others is not gone on with
        identity = fingerprint([task.config.fingerprint, space, algo, list(seeds), made_of])
        self.folder = folder / f"{task.config['model']}-{identity[:8]}"
        self._study = self._open()
        self._started = datetime.now()

    def _open(self) -> Any:
        """Open the study on disk, without an incomplete last line of a killed process."""
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
            raise ValueError(f"{file} is damaged ({error}); delete it; the records of its runs are reused") from error

    def check(self, file: Path) -> None:
        """Refuse a file of the space whose first settings the model cannot have, before anything runs.

        Raises:
            ValueError: names the file and the key.
        """
        try:
            _ = self.task.with_settings(self._settings(self._draw(0))).config
        except ValueError as error:
            raise ValueError(f"--params_file={file}: {error}") from error

    def run(self) -> None:
        """Evaluate the remaining runs; the same seed draws the same settings.

        A run that another process is evaluating is left to it. At the end, this one waits for those runs, and takes up that of a
        process which dies: the operating system then releases its lock.

        Raises:
            ValueError: every run failed.
        """
        show = bool(self.task.config["show_progress"])
        with progress_bar("search", self.max_evals, start=len(self._ended()), show=show) as bar:
            for patience in (0, -1):
                for index in sorted({*range(self.max_evals)} - self._ended()):
                    with contextlib.suppress(Timeout), FileLock(self.folder / f"run-{index}.lock", timeout=patience):
                        if index not in self._ended():
                            self._evaluate(index, bar)
                        bar.advance()
        if self.trials[0].score is None:
            raise ValueError(f"every run of the search failed; the last one: {self.trials[-1].error}")

    def _ended(self) -> set[int]:
        """Runs with a score, and those that failed since the start of this search; earlier failures are repeated."""
        trials = self._study.get_trials(deepcopy=False)
        return {one.user_attrs["index"] for one in trials if one.value is not None or one.datetime_complete > self._started}

    def _evaluate(self, index: int, bar: Bar) -> None:
        drawn = self._draw(index)
        settings = self._settings(drawn)
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        try:
            scores = [self._score(task.with_settings(settings), bar) for task in self.tasks]
            outcome: dict[str, Any] = {"value": float(np.mean(scores)), "user_attrs": {"index": index, "by seed": scores}}
            logger.info(f"search: {index + 1}/{self.max_evals}: {shown}: {outcome['value']:.4f}")
        except (ValueError, FileNotFoundError) as error:
            outcome = {"state": self._optuna.trial.TrialState.FAIL, "user_attrs": {"index": index, "error": str(error)}}
            logger.warning(f"search: {index + 1}/{self.max_evals}: {shown}: failed: {error}")
        trial = self._optuna.create_trial(params=drawn, distributions=self._distributions, **outcome)
        self._study.add_trial(trial)

    def _draw(self, index: int) -> dict[str, Any]:
        """Draw the parameters of a run from a study in memory, as the one on disk has ended runs only."""
        if self.algo != "bayes":
            return self._draws[index]
        sampler = self._optuna.samplers.TPESampler(seed=self.task.seed + index)
        study = self._optuna.create_study(direction=self._direction, sampler=sampler)
        study.add_trials([one for one in self._study.get_trials() if one.value is not None])
        return study.ask(self._distributions).params

    @cached_property
    def _draws(self) -> list[dict[str, Any]]:
        """The parameters of all runs, if the draws do not depend on scores."""
        if self.algo == "exhaustive":
            choices = {key: list(line.choices) for key, line in self._distributions.items()}
            sampler = self._optuna.samplers.GridSampler(choices, seed=self.task.seed)
        else:
            sampler = self._optuna.samplers.RandomSampler(seed=self.task.seed)
        study = self._optuna.create_study(sampler=sampler)
        return [study.ask(self._distributions).params for _ in range(self.max_evals)]

    def _settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of drawn parameters, in which a choice is a string."""
        choices = {key: {repr(value): value for value in values} for key, (_, values) in self.space.items()}
        return {key: choices[key].get(drawn[key], drawn[key]) for key in self.space}

    def _score(self, task: Task, bar: Bar) -> float:
        """The validation score of a run, which is started if it has no sound record of this code and data."""
        if not task.is_current:
            for _, reason in run_each([task], self.folder / "logs", bar):
                if reason:
                    raise ValueError(reason)
        score = ((task.read() or {}).get("best_valid_result") or {}).get(task.config["valid_metric"].lower(), math.nan)
        if not math.isfinite(score):
            raise ValueError(f"the validation score is {score} ({task.record})")
        return score

    @property
    def trials(self) -> list[Trial]:
        """The trials, each setting once, the best first."""
        last = {repr(one.params): one for one in self._study.get_trials(deepcopy=False)}  # a draw may repeat one
        found = [Trial(self._settings(one.params), one.value, one.user_attrs.get("error", "")) for one in last.values()]
        sign = -1 if self._direction == "maximize" else 1
        return sorted(found, key=lambda one: math.inf if one.score is None else sign * one.score)

    @property
    def note(self) -> str:
        """Search space and budget."""
        trials = self.trials
        failed = sum(one.score is None for one in trials)
        lines = [f"{key} {kind} {values}".replace(" choice ", " ", 1) for key, (kind, values) in self.space.items()]
        count = f"{len(trials)}" + f" ({failed} failed)" * bool(failed)
        found = f"best of {count} by validation {self.task.config['valid_metric']} ({trials[0].score:.4f})"
        seeds = ", ".join(str(task.seed) for task in self.tasks)
        return f"{found}, {self.algo} search, seed{'s' * (len(self.tasks) > 1)} {seeds}: {'; '.join(lines)}"

    def best_properties(self) -> dict[str, Any]:
        """The settings of the model that were given, in files and beside them, the best settings, and the note."""
        files = [read_yaml(property_file(file)) for file in self.task.config_files]
        layers = PropertyFiles().merge(*files, self.task.settings)
        given = {key: value for key, value in layers.items() if key not in ABOUT_DATA and key not in ("model", "dataset", "seed")}
        return {**PropertyFiles().merge(given, self.trials[0].settings), "note": self.note}
