"""Texts in CSV files, which spreadsheets compute if they begin as a formula does."""

from __future__ import annotations

from typing import Any

_FORMULA = ("=", "+", "-", "@")


def guard(value: Any) -> Any:
    """The value of a cell; a text that begins as a formula does gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value
