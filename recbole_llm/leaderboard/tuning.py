"""Hyper-parameter search through RecBole's HyperTuning (hyperopt): a search file in, a property file of the best settings out.

Each evaluation is an ordinary run whose record is kept, so a search that was killed goes on. Of a record, nothing is read but its
validation score: what the test users said decides nothing and is not shown.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recbole.trainer import HyperTuning
from tabulate import tabulate

from recbole_llm.config import ABOUT_DATA, LLMConfig, parse_value, property_file, read_arguments
from recbole_llm.leaderboard.plan import Task
from recbole_llm.leaderboard.runner import run_process
from recbole_llm.store.files import atomic_write

Space = dict[str, dict[str, Any]]
"""HyperTuning's ``params_dict``: kind -> key -> its choices, or its bounds."""

_KINDS = {"choice": None, "uniform": 2, "loguniform": 2, "quniform": 3}  # how many numbers each takes
_EPILOG = """a line of the search file is RecBole's, `key kind values`:
  learning_rate loguniform -8, -5         natural logarithms of the bounds, as in hyperopt
  hidden_dropout_prob choice [0.2, 0.5]
any other --key=value is a key of every run."""


def read_space(file: Path) -> Space:
    """A search file in RecBole's form, whose values are read as literals and never evaluated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that says something else, or a key that would change what is measured; names file and line.
    """
    space: Space = {}
    for number, line in enumerate(property_file(file, "--params_file").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, kind, text = (*line.split(maxsplit=2), "", "")[:3]
        values = _values(kind, text)
        if values is None:
            raise ValueError(f"{file}, line {number}: {line!r} is none of: {_forms()}")
        if key in ABOUT_DATA or key == "seed":
            raise ValueError(f"{file}, line {number}: scores under another `{key}` answer another question; leave it out")
        space.setdefault(kind, {})[key] = values
    if not space:
        raise ValueError(f"{file}: nothing to search; its lines are: {_forms()}")
    return space


def _values(kind: str, text: str) -> list[Any] | None:
    if kind not in _KINDS:
        return None
    try:
        values = ast.literal_eval(text if kind == "choice" else f"[{text}]")
    except (ValueError, SyntaxError):
        return None
    if kind == "choice":
        return values if isinstance(values, list) and values else None
    numbers = len(values) == _KINDS[kind] and all(type(value) in (int, float) for value in values)
    return values if numbers and values[0] < values[1] else None


def _forms() -> str:
    return "KEY choice [A, B]; KEY uniform LOW, HIGH; KEY loguniform LOW, HIGH; KEY quniform LOW, HIGH, STEP"


def _grid(space: Space) -> list[int]:
    """How many choices each key of a grid has.

    Raises:
        ValueError: a key is no choice.
    """
    for key in (key for kind, keys in space.items() if kind != "choice" for key in keys):
        raise ValueError(f"--algo=exhaustive: `{key}` is no choice; give it choices, or --algo=random or bayes")
    return [len(choices) for choices in space["choice"].values()]


def _next_of_grid(space: Space, new_ids: Sequence[int], domain: Any, trials: Any, seed: int) -> list[Any]:
    """What hyperopt calls for the next point; RecBole's own draws until one is new, by a generator that hyperopt gave up."""
    place = np.unravel_index(len(trials.trials), _grid(space))
    identity = new_ids[0]
    values = {key: [int(index)] for key, index in zip(space["choice"], place, strict=True)}
    where = dict.fromkeys(values, [identity])
    about = {"tid": identity, "cmd": domain.cmd, "workdir": domain.workdir, "idxs": where, "vals": values}
    return trials.new_trial_docs([identity], [None], [domain.new_result()], [about])


class Search(HyperTuning):
    """RecBole's HyperTuning over runs of one model on one dataset; a run that fails is the worst and ends nothing.

    Args:
        task: what every run has in common.
        seeds: with which each setting is run; its score is their mean. One seed finds what is good with this seed.
        space: of :func:`read_space`.
        algo: exhaustive (every combination), random or bayes (tree-structured Parzen estimator).
        max_evals: how many runs, for random and bayes; 10 if not given.
        logs: folder for their output.

    Raises:
        ImportError: hyperopt is not there.
        ValueError: an algorithm that there is not, or one that does not fit the space.
    """

    def __init__(self, task: Task, space: Space, *, seeds: Sequence[int], algo: str, max_evals: int | None, logs: Path):
        if algo not in ("exhaustive", "random", "bayes"):
            raise ValueError(f"--algo={algo}: there is exhaustive, random and bayes")
        if max_evals is not None and max_evals < 1:
            raise ValueError(f"--max_evals={max_evals}: at least one run")
        if algo == "exhaustive":
            size = math.prod(_grid(space))
            if max_evals not in (None, size):
                raise ValueError(f"--max_evals={max_evals}: exhaustive takes all {size}; leave it out, or give --algo=random")
            max_evals = size
        self.task, self.given, self.kind, self.logs = task, space, algo, logs
        self.tasks = [replace(task, seed=seed) for seed in seeds]
        self.outcomes: list[tuple[dict[str, Any], float | None, str]] = []  # settings, score, why it failed
        evaluations = 10 if max_evals is None else max_evals
        try:
            super().__init__(
                self.measure,
                params_dict=space,
                algo=partial(_next_of_grid, space) if algo == "exhaustive" else algo,
                max_evals=evaluations,
                early_stop=evaluations + 1,  # never: every run of the budget is made
            )
        except ModuleNotFoundError as error:
            raise ImportError("a search needs hyperopt: pip install hyperopt") from error

    def measure(self, params: Mapping[str, Any], _: Any = None) -> dict[str, Any]:
        """A run for each seed, or its record where it is kept; the result is of the validation users."""
        scores = [self._score(task.with_settings(params)) for task in self.tasks]
        return {
            "model": self.task.model,
            "best_valid_score": float(np.mean(scores)),
            "valid_score_bigger": self.task.config["valid_metric_bigger"],
            "best_valid_result": {"by seed": scores},
        }

    def _score(self, task: Task) -> float:
        if not task.record.is_file():
            threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
            log = self.logs / f"{task.record.parent.name}.log"
            if reason := run_process([*task.arguments, "--show_progress=False"], log, threads):
                raise ValueError(reason)
        record = json.loads(task.record.read_text(encoding="utf-8"))
        return record["best_valid_result"][task.config["valid_metric"].lower()]

    def trial(self, params: dict[str, Any]) -> dict[str, Any]:
        """As RecBole's; a failure is told to hyperopt as one."""
        params = {key: _as_given(value) for key, value in params.items()}
        try:
            result = super().trial(params)
        except (ValueError, FileNotFoundError) as error:
            logging.getLogger().warning(f"failed: {error}")
            self._keep(params, None, str(error))
            return {"status": "fail", "loss": math.inf}
        self._keep(params, self.score_list[-1], "")
        return result

    def _keep(self, *outcome: Any) -> None:
        if outcome not in self.outcomes:  # a draw may repeat one, whose record is there
            self.outcomes.append(outcome)

    @staticmethod
    def _print_result(result_dict: dict[str, Any]) -> None:
        print(f"current best valid score: {result_dict['best_valid_score']:.4f}")

    def run(self) -> None:
        """Search; the same seed draws the same settings.

        Raises:
            ValueError: every run failed.
        """
        from hyperopt.exceptions import AllTrialsFailed

        os.environ["HYPEROPT_FMIN_SEED"] = str(self.task.seed)
        try:
            super().run()
        except AllTrialsFailed as error:
            raise ValueError(f"every run of the search failed; the last one: {self.outcomes[-1][2]}") from error

    @property
    def note(self) -> str:
        """Search space and budget, as a leaderboard shows them beside the row."""
        failed = sum(score is None for _, score, _ in self.outcomes)
        ranges = [
            f"{key} {values}" if kind == "choice" else f"{key} {kind} {values}"
            for kind, keys in self.given.items()
            for key, values in keys.items()
        ]
        count = f"{len(self.outcomes)}" + (f" ({failed} failed)" if failed else "")
        metric = self.task.config["valid_metric"]
        found = f"best of {count} by validation {metric} ({self.best_score:.4f})"
        seeds = ", ".join(str(task.seed) for task in self.tasks)
        return f"{found}, {self.kind} search, seed{'s' * (len(self.tasks) > 1)} {seeds}: {'; '.join(ranges)}"

    def table(self) -> str:
        """All settings, the best first."""
        keys = list(self.outcomes[0][0])
        bigger = self.task.config["valid_metric_bigger"]
        ranked = sorted(self.outcomes, key=lambda out: math.inf if out[1] is None else -out[1] if bigger else out[1])
        rows = [[*(params[key] for key in keys), why if score is None else f"{score:.4f}"] for params, score, why in ranked]
        return tabulate(rows, headers=[*keys, f"valid {self.task.config['valid_metric']}"], disable_numparse=True)

    def properties(self, command: str) -> str:
        """The best settings, with what was given for the model beside them, as a property file."""
        given = {key: value for key, value in self.task.settings.items() if key not in ABOUT_DATA}
        values = {"note": self.note, **given, **self.best_params}
        return f"# {command}\n{yaml.safe_dump(values, sort_keys=False, width=1000)}"


def _as_given(value: Any) -> Any:
    return [_as_given(part) for part in value] if isinstance(value, tuple) else value  # hyperopt makes tuples of lists


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of ``run_hyper.py``; a mistake ends in one line."""
    parser = argparse.ArgumentParser(
        prog="run_hyper.py",
        description="Search hyper-parameters of one model on one dataset, by the validation score.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--dataset", "-d", required=True)
    parser.add_argument("--config_files", default="", help="property files, separated by blanks")
    parser.add_argument(
        "--params_file", type=Path, required=True, help="what is searched, such as properties/search/SASRec.hyper"
    )
    parser.add_argument("--algo", default="exhaustive", help="exhaustive (every combination), random or bayes")
    parser.add_argument("--max_evals", type=int, help="runs of random and bayes (10)")
    parser.add_argument("--seeds", help="such as [2020, 2021]: run each setting with all of them, take the mean score (--seed)")
    parser.add_argument("--output_file", type=Path, help="(<checkpoint_dir>/hyper/<dataset>/<Model>.yaml)")
    known, others = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        space = read_space(known.params_file)
        files = tuple(known.config_files.split())
        config = LLMConfig(known.model, known.dataset, files, cmd_line=others)
        settings = {key: value for key, value in read_arguments(others).items() if key != "seed"}
        task = Task(known.model, known.model, known.dataset, config["seed"], "search", settings, config_files=files)
        out = known.output_file or Path(config["checkpoint_dir"]) / "hyper" / known.dataset / f"{known.model}.yaml"
        logs = Path(config["checkpoint_dir"]) / "hyper" / "logs"
        seeds = [config["seed"]] if known.seeds is None else parse_value(known.seeds)
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"--seeds={known.seeds}: give a list of whole numbers, as [2020, 2021]")
        search = Search(task, space, seeds=seeds, algo=known.algo, max_evals=known.max_evals, logs=logs)
        search.run()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    command = shlex.join(["python", "run_hyper.py", *(sys.argv[1:] if arguments is None else arguments)])
    atomic_write(out, search.properties(command))
    print(f"{search.table()}\n{out}: {search.note}")


if __name__ == "__main__":
    main()
