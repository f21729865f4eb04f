"""Values of the command line's own options, read with errors for the user."""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNQUOTED = re.compile(r"""\{([^{}'",:]+:[^{}'",:]+(?:,[^{}'",:]+:[^{}'",:]+)*)\}""")


def list_of(*kinds: type) -> Callable[[str], list[Any]]:
    """A reader of a list whose values are of some of ``kinds``."""

    def read(text: str) -> list[Any]:
        values = None
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values = ast.literal_eval(text)
        if not isinstance(values, list) or not values or not all(type(value) in kinds for value in values):
            example = "numbers, such as [0.3, 0.7]" if float in kinds else "whole numbers, such as [2020, 2021]"
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {example}")
        return values

    return read


def columns(text: str) -> dict[str, Any]:
    """A dictionary of columns by role, ``{'user': 'uid', 'time': None}``; a number is the place of a column."""
    values: Any = None
    with contextlib.suppress(ValueError, SyntaxError):
        values = ast.literal_eval(text)
    if unquoted := _UNQUOTED.fullmatch(text):  # a shell has removed the inner quotes
        pairs = (pair.partition(":") for pair in unquoted[1].split(","))
        values = {role.strip(): _value(name.strip()) for role, _, name in pairs}
    if not isinstance(values, dict) or not all(
        isinstance(role, str) and type(name) in (str, int, type(None)) for role, name in values.items()
    ):
        raise argparse.ArgumentTypeError(f"{text!r} does not name columns, such as {{'user': 'uid', 'item': 'track'}}")
    return values


def _value(name: str) -> str | int | None:
    return None if name == "None" else int(name) if name.isdecimal() else name


def paths(text: str) -> list[str]:
    """The parts of ``[NAME=]PATH [NAME=]PATH ...``, or one path that has spaces in it."""
    return [text] if any(Path(path).exists() for path in (text, text.partition("=")[2] or text)) else shlex.split(text)
