"""RecBole's own models, each trained for an epoch and evaluated on tiny data: which run, and why others do not.

    python benchmarks/recbole_models.py --json recbole.json

The data have every column that a model reads: ratings, features of users and items, a knowledge graph with its links, vectors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import recbole.model

from recbole_llm import registry
from recbole_llm.classical.building import NEEDS
from recbole_llm.quick_start import run_recbole_llm
from tests.contract import recbole_data

KINDS = ("general", "sequential", "context_aware", "knowledge_aware")


def kinds() -> dict[str, str]:
    """Model -> the kind that RecBole gives it by its folder."""
    folder = Path(recbole.model.__file__).parent
    by_file = {file.stem: kind for kind in KINDS for file in (folder / f"{kind}_recommender").glob("[a-z]*.py")}
    return {name: by_file[name.lower()] for name in registry._recbole_class_names()}


def problem(name: str, kind: str, data: Path, folder: Path) -> str:
    """Why a model does not run; empty if it does."""
    try:
        with contextlib.chdir(folder), warnings.catch_warnings(action="ignore"):
            found = run_recbole_llm(name, "rich", config_dict=recbole_data.settings(name, kind, data, folder / name))
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    odd = [metric for metric, value in found["test_result"].items() if not math.isfinite(value)]
    return f"{', '.join(odd)} is not finite" if odd else ""


def section(names: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """A section for ``benchmarks/reliability.py --add FILE``."""
    run, left, notes = defaultdict(list), defaultdict(list), []
    with tempfile.TemporaryDirectory() as place:
        data = recbole_data.write(Path(place) / "data")
        for name, kind in names.items():
            why = problem(name, kind, data, Path(place))
            (left if why else run)[kind].append(name)
            notes += [f"{name}: {why}"] if why else []
    shown = [kind for kind in KINDS if kind in names.values()]
    rows = [[kind.replace("_", "-"), str(len(run[kind])), ", ".join(run[kind]), ", ".join(left[kind])] for kind in shown]
    notes += [
        f"{model} imports {package}, which this package does not require" for model, package in NEEDS.items() if model in names
    ]
    notes.append("lightgbm, xgboost: trees of other libraries, which RecBole trains in a loop of their own; not supported")
    return {
        "part": "recbole",
        "title": "RecBole's own models: an epoch and an evaluation on tiny data",
        "columns": ["kind", "number", "run", "do not run"],
        "rows": rows,
        "notes": notes,
        "command": shlex.join(["python", "benchmarks/recbole_models.py", *arguments]),
        "machine": f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a model does not run for another reason than a package that it needs."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*kinds()], choices=[*kinds()], metavar="MODEL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a section for benchmarks/reliability.py --add FILE")
    options = parser.parse_args(given)
    logging.disable(logging.WARNING)
    try:
        chosen = {name: kind for name, kind in kinds().items() if name in options.models}
        found = section(chosen, [] if options.models == [*kinds()] else ["--models", *options.models])
    finally:
        logging.disable(logging.NOTSET)
    for row in found["rows"]:
        print("{}: {} run: {}".format(*row))
    print(*found["notes"], sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(name not in NEEDS for row in found["rows"] for name in row[3].split(", ") if name))


if __name__ == "__main__":
    sys.exit(main())
