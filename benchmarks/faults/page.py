"""docs/reliability.md, made of docs/reliability.json alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

ORDER = ("kills", "damages", "disk", "hostile", "processes", "load", "memory", "versions")
_WIDTH = 130  # of a line that is not of a table
_HEAD = """# Reliability

This page is written by `python benchmarks/reliability.py` from [reliability.json](reliability.json); nothing in it is typed by
hand. Each section has its command, and what fell short is in the section.

"""


def page(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as Markdown."""
    known = [name for name in ORDER if name in sections]
    ordered = [sections[name] for name in (*known, *sorted(sections.keys() - set(ORDER)))]
    return _HEAD + "\n".join(map(_section, ordered))


def _section(part: Mapping[str, Any]) -> str:
    notes = "".join(f"{_lines('- ' + note, '  ')}\n" for note in part["notes"])
    measured = _lines(f"{part['machine']}, {part['date']}: `{part['command']}`")
    table = _table([part["columns"], ["---"] * len(part["columns"]), *part["rows"]])
    return f"## {_text(part['title'])}\n\n{table}\n{notes}\n{measured}\n"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    return "".join("| " + " | ".join(map(_cell, row)) + " |\n" for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    shown = (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else value
    )
    return _text(str(shown)).replace("|", "\\|")


def _lines(text: str, indent: str = "") -> str:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(_text(text), _WIDTH, subsequent_indent=indent, **options)


def _text(text: str) -> str:
    return " ".join(text.split())
