"""Pages beside a leaderboard: what the best rows of each of its tables recommend to each user."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path

from recbole_llm.leaderboard.board import Beside
from recbole_llm.leaderboard.table import DONE, Cell, Leaderboard, Table
from recbole_llm.leaderboard.task import Task
from recbole_llm.look.columns import Column, check
from recbole_llm.look.content import page_content
from recbole_llm.look.page import to_html
from recbole_llm.store.files import atomic_write

logger = getLogger()


def pages_of(number: int) -> Beside:
    """Writes a page for each table, ``look.html`` or of several tables ``look-<protocol>.html``, of its best rows.

    A table whose runs cannot be loaded has no page, and the log tells the reason.

    Args:
        number: of rows, each with its first seed.

    Raises:
        ValueError: fewer than one row.
    """
    if number < 1:
        raise ValueError(f"--look={number}: give a number of rows, 1 or more")

    def write(cells: Mapping[Task, Cell], leaderboard: Leaderboard, folder: Path) -> Sequence[Path]:
        found = []
        for table, name in zip(leaderboard.tables, _names(leaderboard.tables), strict=True):
            path, columns = folder / name, _columns(table, cells)[:number]
            path.unlink(missing_ok=True)  # an earlier page may have other runs
            try:
                if not columns:
                    raise ValueError("no row has a rank of each user")
                check(columns)
                atomic_write(path, to_html(page_content(columns), columns))
                found.append(path)
            except (ValueError, OSError) as error:
                logger.warning(f"leaderboard: {table.protocol} has no page of lists: {error}")
        return found

    return write


def _names(tables: Sequence[Table]) -> list[str]:
    if len(tables) == 1:
        return ["look.html"]
    slugs = [re.sub(r"[^\w-]+", "-", table.protocol) for table in tables]
    numbered = enumerate(slugs, start=1)
    return [f"look-{slug}.html" if slugs.count(slug) == 1 else f"look-{slug}-{place}.html" for place, slug in numbered]


def _columns(table: Table, cells: Mapping[Task, Cell]) -> list[Column]:
    """The rows of a table with ranks by user, best first."""
    first: dict[str, Column] = {}
    for task, cell in cells.items():
        if cell.protocol == table.protocol and cell.status == DONE and cell.record is not None:
            first.setdefault(cell.label, Column(cell.label, task.record, cell.record, cell.model))
    found = [first[row.label] for row in table.rows if row.label in first]
    return [column for column in found if column.ranks]
