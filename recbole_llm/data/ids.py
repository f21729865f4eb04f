"""Ids of users and items: which are refused, and whether two tables use the same ids.

An id that is ``265`` in one table and ``265.0`` in another is two ids to every reader. Here it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError

logger = getLogger()

_PADDING = "[PAD]"  # RecBole's token of internal id 0
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff]|^\\s|\\s$")
_WHOLE = re.compile(r"0*(\d+)(?:\.0*)?")


def check_ids(file: AtomicFile, name: str, tokens: Collection[str]) -> None:
    """Check the ids that occur in a column.

    Raises:
        AtomicFileError: one is empty, contains invisible characters, begins or ends with white space, is RecBole's padding token,
            or is written in two ways (``265`` and ``265.0``).
    """
    if "" in tokens:
        raise file.error(name, lambda token: not token, "is an empty id; fill it in or remove the row")
    if _PADDING in tokens:
        raise file.error(name, lambda token: token == _PADDING, "is RecBole's name of the padding id; rename it")
    if any(map(_INVISIBLE.search, tokens)):
        reason = "is an id with a control character, or with white space at its start or end; remove that from the file"
        raise file.error(name, _INVISIBLE.search, reason)
    if twice := written_twice(tokens):
        raise file.error(name, lambda token: token == twice[0], f"is also written as {twice[1]!r}; write each id in one way")


def written_twice(tokens: Collection[str]) -> tuple[str, str] | None:
    """``("265.0", "265")`` if both are among the tokens."""
    known = {*tokens}
    return next(((token, token[:-2]) for token in tokens if token.endswith(".0") and token[:-2] in known), None)


def report_repeated(file: AtomicFile, name: str, tokens: np.ndarray) -> None:
    """Warn of ids [R] that have several rows in a table of users or items, of which RecBole and the item texts take the first."""
    repeated = pd.Series(tokens).duplicated()
    if repeated.any():
        first = tokens[repeated.argmax()]
        logger.warning(
            f"{file.path}: {repeated.sum()} rows repeat a {name}, the first is {first!r}; the first row of each counts"
        )


def check_joined(tokens: Sequence[str], rows: Collection[str], *, name: str, other: Path) -> None:
    """Check that the ids ``tokens`` of interactions have their rows in the file ``other``, whose ids are ``rows``.

    Raises:
        AtomicFileError: no id has a row, or those without one would have one if numbers, capitals or quotation marks were alike.
    """
    missing = [token for token in tokens if token not in rows]
    if not missing:
        return
    forms = {_form(row): row for row in rows}
    twins = [(token, forms[form]) for token in missing if (form := _form(token)) in forms]
    numbers = [pair for pair in twins if all(map(_WHOLE.fullmatch, pair))]
    if numbers or 2 * len(twins) > len(missing):
        token, row = [*numbers, *twins][0]
        reason = f"{token!r} in .inter seems to be {row!r} there; write each id in one way"
    elif len(missing) == len(tokens):
        reason = f"they are {_some(tokens)} in .inter and {_some([*rows])} there; the ids must be the same"
    else:
        return
    raise AtomicFileError(f"{name}: {len(missing)} of {len(tokens)} ids of the interactions have no row in {other}: {reason}")


def _form(token: str) -> str:
    """The same for ids that differ in case, in quotation marks and white space around them, or in how a number is written."""
    plain = token.strip().strip("\"'").strip().casefold()
    whole = _WHOLE.fullmatch(plain)
    return whole[1] if whole else plain


def _some(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
