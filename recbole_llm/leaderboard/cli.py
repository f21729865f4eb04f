"""The command lines of ``run_leaderboard.py`` and ``run_hyper.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

_MISTAKES = (ValueError, FileNotFoundError, ImportError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write and show the leaderboard; exits with 1 where a cell failed."""
    parser = argparse.ArgumentParser(
        prog="run_leaderboard.py",
        description="Run models, seeds and protocols of a property file and put them into one table.",
        epilog="any other --key=value is a key of every run and wins over the file's, such as --data_path or --checkpoint_dir",
        allow_abbrev=False,
    )
    parser.add_argument("--config_files", type=Path, required=True, help="such as properties/leaderboard/ml-100k.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they divide the cores (1)")
    parser.add_argument("--engine", default="process", help="process (this machine), or local or slurm through submitit")
    parser.add_argument("--out", type=Path, help="folder of the leaderboard (<checkpoint_dir>/leaderboard/<file>)")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    known, others = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    from recbole_llm.config import read_arguments
    from recbole_llm.leaderboard.board import make_leaderboard
    from recbole_llm.leaderboard.formats import to_markdown

    try:
        options = {"jobs": known.jobs, "engine": known.engine, "out": known.out, "show": known.show}
        leaderboard, files = make_leaderboard(known.config_files, read_arguments(others), **options)
    except _MISTAKES as error:
        sys.exit(f"error: {error}")
    print(to_markdown(leaderboard))
    print("\n".join(map(str, files)))
    if leaderboard.failed:
        sys.exit(f"error: cells that failed: {leaderboard.failed}")


def tune(arguments: Sequence[str] | None = None) -> None:
    """Search hyper-parameters, then show the settings and where the best ones are."""
    parser = argparse.ArgumentParser(
        prog="run_hyper.py",
        description="Search hyper-parameters of one model on one dataset, by the validation score.",
        epilog="any other --key=value is a key of every run",
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--dataset", "-d", required=True)
    parser.add_argument("--config_files", default="", help="property files, separated by blanks")
    parser.add_argument("--params_file", type=Path, required=True, help="such as properties/search/SASRec.hyper")
    parser.add_argument("--algo", default="exhaustive", help="exhaustive (every combination), random or bayes")
    parser.add_argument("--max_evals", type=int, help="runs of random and bayes (10)")
    parser.add_argument("--seeds", help="such as [2020, 2021]: run each setting with all of them, take the mean score (--seed)")
    parser.add_argument("--output_file", type=Path, help="(<checkpoint_dir>/tuning/<dataset>/<Model>.yaml)")
    known, others = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    from recbole_llm.config import parse_value
    from recbole_llm.leaderboard import tuning

    options = {**vars(known), "config_files": known.config_files.split(), "arguments": others}
    try:
        result = tuning.tune(**options | {"seeds": None if known.seeds is None else parse_value(known.seeds)})
    except _MISTAKES as error:
        sys.exit(f"error: {error}")
    print(f"{result.table()}\n{result.file}: {result.note}")
