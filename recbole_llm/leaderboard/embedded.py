"""A part of a Markdown page that a command writes, between two marks of the page."""

from __future__ import annotations

from pathlib import Path

from recbole_llm.leaderboard.formats import tables_in_markdown
from recbole_llm.leaderboard.pictures import in_a_file, metric_picture
from recbole_llm.leaderboard.table import Leaderboard, Table
from recbole_llm.store.files import atomic_write

END = "<!-- end of leaderboard -->"


def replaced(page: str, begin: str, end: str, text: str) -> str | None:
    """The page with ``text`` between the marks; None if it has no such marks."""
    before, mark, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    return f"{before}{mark}\n{text}{last}{after}" if mark and last else None


def with_tables(file: Path, name: str, tables: str) -> str:
    """The text of a page with the tables of the leaderboard of ``<name>.yaml`` between its marks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no marks of this leaderboard; gives them.
    """
    begin = f"<!-- leaderboard {name}: written by recbole-llm leaderboard -->"
    found = replaced(file.read_text(encoding="utf-8"), begin, END, f"\n{tables}\n")
    if found is None:
        raise ValueError(f"--page: {file} has no place for the tables; add these two lines to it:\n{begin}\n{END}")
    return found


def embed(file: Path, name: str, board: Leaderboard) -> list[Path]:
    """Write the tables into the page, below a picture of each that is written beside it; returns the files.

    Raises:
        FileNotFoundError, ValueError: as :func:`with_tables`.
    """
    drawn: dict[Path, str] = {}
    shown = ""
    for table in board.tables:
        if svg := metric_picture(table):
            picture = _picture_file(file, table, board)
            drawn[picture] = svg
            shown += f"![{table.metric} of each row]({picture.name})\n\n*{_caption(table)}*\n\n"
    text = with_tables(file, name, shown + tables_in_markdown(board, headings=False))
    for picture, svg in drawn.items():
        atomic_write(picture, in_a_file(svg))
    atomic_write(file, text)
    return [*drawn, file]


def _picture_file(page: Path, table: Table, board: Leaderboard) -> Path:
    return page.with_name(f"{page.stem}{f'-{table.protocol}' if len(board.tables) > 1 else ''}.svg")


def _caption(table: Table) -> str:
    rows = {row.backbone is not None for row in table.rows if not row.shortcut}
    colours = ["blue: with a language model or text encoder"] * (True in rows) + ["brown: without"] * (rows == {True, False})
    colours += ["grey: untrained rules (†), the dashed line at the best"] * bool(table.shortcuts)
    return "; ".join([f"{table.metric} with 95 % intervals over users", *colours]) + "."
