"""What a search draws from: RecBole's ``.hyper`` files, a line ``key kind values`` for each key."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from recbole_llm.config.key_groups import ABOUT_DATA
from recbole_llm.config.property_files import property_file

Space = dict[str, tuple[str, list[Any]]]
"""What is searched: key -> kind, and its choices or its bounds."""

_KINDS = {"choice": None, "uniform": 2, "loguniform": 2, "quniform": 3}  # how many numbers each takes
_FORMS = "KEY choice [A, B]; KEY uniform LOW, HIGH; KEY loguniform LOW, HIGH; KEY quniform LOW, HIGH, STEP"


def read_space(file: Path) -> Space:
    """A search file in RecBole's form, whose values are read as literals and never evaluated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line in another form, or a key that would change what is measured; names file and line.
    """
    space: Space = {}
    for number, line in enumerate(property_file(file, "--params_file").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, kind, text = (*line.split(maxsplit=2), "", "")[:3]
        values = _values(kind, text)
        if values is None:
            raise ValueError(f"{file}, line {number}: {line!r} is none of: {_FORMS}")
        if key in ABOUT_DATA or key == "seed":
            raise ValueError(f"{file}, line {number}: scores under another `{key}` answer another question; leave it out")
        if key in space:
            raise ValueError(f"{file}, line {number}: `{key}` is given twice; keep one line")
        space[key] = kind, values
    if not space:
        raise ValueError(f"{file}: nothing to search; its lines are: {_FORMS}")
    return space


def _values(kind: str, text: str) -> list[Any] | None:
    if kind not in _KINDS:
        return None
    try:
        values = ast.literal_eval(text if kind == "choice" else f"[{text}]")
    except (ValueError, SyntaxError):
        return None
    if kind == "choice":
        return values if isinstance(values, list) and values else None
    if len(values) != _KINDS[kind] or not all(type(value) in (int, float) and abs(value) < 1e300 for value in values):
        return None
    fits = values[0] < values[1] and (kind != "quniform" or values[2] > 0) and (kind != "loguniform" or values[1] < 700)
    return values if fits else None


def distribution(kind: str, values: Sequence[Any]) -> Any:
    """Optuna's form of a line; choices are drawn as text, since they may be lists."""
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
