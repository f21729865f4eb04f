"""Make a leaderboard from a property file: run what has no record, compare, write every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config.property_files import property_file, read_yaml
from recbole_llm.leaderboard.embedded import embed, with_tables
from recbole_llm.leaderboard.formats import to_csv, to_latex, to_markdown
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.leaderboard.runner import run_tasks
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Cell, Leaderboard, to_json
from recbole_llm.leaderboard.task import Task
from recbole_llm.store.files import atomic_write

Beside = Callable[[Mapping[Task, Cell], Leaderboard, Path], Sequence[Path]]
"""Writes pages ``look*.html`` about the cells of a leaderboard into its folder; returns their paths."""

_FORMATS = {"json": to_json, "md": to_markdown, "csv": to_csv, "tex": to_latex}


def make_leaderboard(
    file: Path,
    changes: Mapping[str, Any],
    *,
    jobs: int = 1,
    engine: str = "process",
    out: Path | None = None,
    show: bool = False,
    beside: Beside | None = None,
    page: Path | None = None,
) -> tuple[Leaderboard, list[Path]]:
    """Run what has no record; returns the leaderboard and its files.

    Args:
        file, changes: as in :func:`recbole_llm.leaderboard.plan.read_plan`.
        jobs, engine: as in :func:`recbole_llm.leaderboard.runner.run_tasks`.
        out: folder of the files, by default ``<checkpoint_dir>/leaderboard/<name of the file>``.
        show: run nothing and show the existing records.
        beside: writes further pages, to which the page of the leaderboard links.
        page: a Markdown page in which the tables are written, each with a picture, see :mod:`recbole_llm.leaderboard.embedded`.

    Raises:
        ValueError, FileNotFoundError: the file, an option or the page is invalid; or there is nothing to show.
        ImportError: the engine needs submitit, which is not installed.
    """
    tasks, out = read_plan(file, changes), out or folder_of(file, changes)
    if page:  # before anything runs
        with_tables(page, file.stem, "")
    cells = run_cells(tasks, out, jobs=jobs, engine=engine, show=show)
    if show and not any(cell.record or cell.error for cell in cells.values()):  # an earlier table stays
        raise ValueError(f"{file}: with these keys, no run has a record below checkpoint_dir; leave --show out to run them")
    leaderboard = build(list(cells.values()), f"Leaderboard {file.stem}")
    files = write_all(leaderboard, out)
    if page:
        files += embed(page, file.stem, leaderboard)
    if beside is None:
        return leaderboard, files
    pages = beside(cells, leaderboard, out)
    return leaderboard, [*write_all(leaderboard, out), *pages]


def folder_of(file: Path, changes: Mapping[str, Any]) -> Path:
    """The default folder of the files of a leaderboard, below the ``checkpoint_dir`` of all its runs."""
    settings = {**(read_yaml(property_file(file)).get("settings") or {}), **changes}
    return Path(str(settings.get("checkpoint_dir", "saved"))) / "leaderboard" / file.stem


def run_cells(
    tasks: Sequence[Task], out: Path, *, jobs: int = 1, engine: str = "process", show: bool = False
) -> dict[Task, Cell]:
    """Run the tasks without a record, unless ``show``; returns the cell of each task. Arguments as :func:`make_leaderboard`."""
    reasons = {} if show else run_tasks(tasks, out / "logs", jobs=jobs, engine=engine)
    return {task: task.cell(reasons.get(task)) for task in tasks}


def write_all(leaderboard: Leaderboard, folder: Path) -> list[Path]:
    """Write ``leaderboard.{json,md,csv,tex,html}`` into ``folder``, and return the paths.

    The page links to the pages of ``recbole-llm look`` that are there.
    """
    texts = {folder / f"leaderboard.{ending}": write(leaderboard) for ending, write in _FORMATS.items()}
    texts[folder / "leaderboard.html"] = to_html(leaderboard, sorted(path.name for path in folder.glob("look*.html")))
    for path, text in texts.items():
        atomic_write(path, text)
    return list(texts)
