"""Values of the command line's own options, read with errors for the user."""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Callable
from typing import Any


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
