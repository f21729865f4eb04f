"""A part of a Markdown page that a command writes, between two marks of the page."""

from __future__ import annotations

from pathlib import Path

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


def embed(file: Path, name: str, tables: str) -> None:
    """Write :func:`with_tables` into the page; raises as that does."""
    atomic_write(file, with_tables(file, name, tables))
