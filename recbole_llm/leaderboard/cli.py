"""The command line of ``run_leaderboard.py``: a property file in, a leaderboard out; interrupted, it goes on."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

_EPILOG = """any other --key=value is a key of every run and wins over the file's, for instance:
  --data_path=DIR                         folder that holds <dataset>/<dataset>.inter and .item
  --checkpoint_dir=DIR                    where runs and stages are kept (saved)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write and show the leaderboard; a mistake in the file ends in one line."""
    parser = argparse.ArgumentParser(
        prog="run_leaderboard.py",
        description="Run models, seeds and protocols of a property file and put them into one table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    from recbole_llm.leaderboard import render
    from recbole_llm.leaderboard.plan import read_plan
    from recbole_llm.leaderboard.runner import run_tasks
    from recbole_llm.leaderboard.table import build

    try:
        changes = read_arguments(others)
        tasks = read_plan(known.config_files, changes)
        out = known.out or Path(str(changes.get("checkpoint_dir", "saved"))) / "leaderboard" / known.config_files.stem
        reasons = {} if known.show else run_tasks(tasks, out / "logs", jobs=known.jobs, engine=known.engine)
        leaderboard = build([task.cell(reasons.get(task)) for task in tasks], title=f"Leaderboard {known.config_files.stem}")
        files = render.write_all(leaderboard, out)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(render.to_markdown(leaderboard))
    print("\n".join(map(str, files)))
