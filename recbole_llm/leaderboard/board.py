"""A property file in, a leaderboard out: run what has no record, compare, write every format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.leaderboard.formats import to_csv, to_latex, to_markdown
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.leaderboard.runner import run_tasks
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard, to_json
from recbole_llm.store.files import atomic_write

_FORMATS = {"json": to_json, "md": to_markdown, "csv": to_csv, "tex": to_latex, "html": to_html}


def make_leaderboard(
    file: Path, changes: Mapping[str, Any], *, jobs: int = 1, engine: str = "process", out: Path | None = None, show: bool = False
) -> tuple[Leaderboard, list[Path]]:
    """Run what has no record yet; returns the leaderboard and the files that were written.

    ``leaderboard.failed`` is the number of failed cells; :func:`recbole_llm.leaderboard.formats.to_markdown` gives it as text.

    Args:
        file: as :func:`recbole_llm.leaderboard.plan.read_plan` reads it.
        changes: keys of every run that win over the file's, such as ``data_path`` or ``checkpoint_dir``.
        jobs, engine: as :func:`recbole_llm.leaderboard.runner.run_tasks` takes them.
        out: folder of the files, by default ``<checkpoint_dir>/leaderboard/<name of the file>``.
        show: run nothing, show what is there.

    Raises:
        ValueError, FileNotFoundError: a mistake in the file or in an option.
        ImportError: the engine needs submitit, which is not installed.
    """
    tasks = read_plan(file, changes)
    out = out or Path(str(changes.get("checkpoint_dir", "saved"))) / "leaderboard" / file.stem
    reasons = {} if show else run_tasks(tasks, out / "logs", jobs=jobs, engine=engine)
    leaderboard = build([task.cell(reasons.get(task)) for task in tasks], f"Leaderboard {file.stem}")
    return leaderboard, write_all(leaderboard, out)


def write_all(leaderboard: Leaderboard, folder: Path) -> list[Path]:
    """Write ``leaderboard.{json,md,csv,tex,html}`` into ``folder``, each whole or not at all; returns the paths."""
    texts = {folder / f"leaderboard.{ending}": write(leaderboard) for ending, write in _FORMATS.items()}
    for path, text in texts.items():  # every format could be made
        atomic_write(path, text)
    return list(texts)
