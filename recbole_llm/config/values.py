"""Values of a command line, read as literals and never evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any


def parse_value(text: str) -> Any:
    """Parse a value as a Python literal, or as YAML's true, false, null or ~; any other text is a string."""
    simple = {"true": True, "false": False, "none": None, "null": None, "~": None}
    if text.strip().lower() in simple:
        return simple[text.strip().lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (str, int, float, list, tuple, dict)) else text  # not an Ellipsis, bytes or a set


def read_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Keys and values of a command line.

    Raises:
        ValueError: an argument is not of the form --key=value, or a key has two values.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"command line: {argument!r} is not of the form --key=value")
        if texts.get(key, text) != text:
            raise ValueError(f"command line: --{key} is given twice, as {texts[key]!r} and {text!r}")
        texts[key] = text
    return {key: parse_value(text) for key, text in texts.items()}


def as_literals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Quote the strings of parsed values, so that parsing them again changes nothing."""
    return {key: repr(value) if isinstance(value, str) else value for key, value in values.items()}


def plain(value: Any) -> Any:
    """A value as JSON-able data."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
