"""The search space, from RecBole's ``.hyper`` files with a line ``key kind values`` for each key."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from recbole_llm.config.key_groups import ABOUT_DATA
from recbole_llm.config.property_files import property_file
from recbole_llm.store.json_files import read_regular

Space = dict[str, tuple[str, list[Any]]]
"""key -> kind, and choices or bounds."""

_KINDS = {"uniform": 2, "loguniform": 2, "quniform": 3}  # number of values
_FORMS = "KEY choice [A, B]; KEY uniform LOW, HIGH; KEY loguniform LOW, HIGH; KEY quniform LOW, HIGH, STEP"


def read_space(file: Path) -> Space:
    """Read a search file, whose values are parsed as literals and never evaluated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line has another form, or a key that changes the data or the evaluation; names file and line.
    """
    space: Space = {}
    try:
        lines = read_regular(property_file(file, "--params_file"), 2**20).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: it is not text in UTF-8 ({error}); write it again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, kind, text = (*line.split(maxsplit=2), "", "")[:3]
        values = _values(kind, text)
        if values is None:
            raise ValueError(f"{file}, line {number}: {line!r} has none of the forms: {_FORMS}")
        if key in {*ABOUT_DATA, "seed", "valid_users"}:
            raise ValueError(f"{file}, line {number}: scores with another `{key}` cannot be compared; remove it")
        if key in space:
            raise ValueError(f"{file}, line {number}: `{key}` is given twice; keep one line")
        space[key] = kind, values
    if not space:
        raise ValueError(f"{file}: the file is empty; the forms of a line are: {_FORMS}")
    return space


def _values(kind: str, text: str) -> list[Any] | None:
    try:
        values = ast.literal_eval(text if kind == "choice" else f"[{text}]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if kind == "choice":
        return values if isinstance(values, list) and values else None
    if len(values) != _KINDS.get(kind) or not all(type(value) in (int, float) and abs(value) < 1e300 for value in values):
        return None
    fits = values[0] < values[1] and (kind != "quniform" or values[2] > 0) and (kind != "loguniform" or values[1] < 700)
    return values if fits else None


def distribution(kind: str, values: Sequence[Any]) -> Any:
    """Optuna's distribution for a line; choices are strings, because Optuna takes no lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if kind == "choice":
        return CategoricalDistribution(tuple(dict.fromkeys(map(repr, values))))
    if kind == "loguniform":  # natural logarithms of the bounds, as in hyperopt
        return FloatDistribution(math.exp(values[0]), math.exp(values[1]), log=True)
    if kind == "uniform":
        return FloatDistribution(*values)
    step = values[2]
    low, high = (round(bound / step) * Decimal(str(step)) for bound in values[:2])  # multiples of the step, as in hyperopt
    if all(type(value) is int for value in values):
        return IntDistribution(int(low), int(high), step=step)
    return FloatDistribution(float(low), float(high), step=step)
