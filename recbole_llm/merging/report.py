"""Plot of the coefficients of a merge by module: one row for each layer, one column for each kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.evaluation.plots import heat_map


def draw_coefficients(file: Path, weights: Mapping[str, Any], method: str) -> list[str]:
    """Plot weights ``module -> adapter -> weight``; returns a line for the log. Global weights are not plotted."""
    if not isinstance(next(iter(weights.values())), dict):
        return []
    places = {module: _place(module) for module in weights}
    layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places.values(), strict=True))
    names = list(dict.fromkeys(name for row in weights.values() for name in row))
    values = np.full((len(layers), len(names) * len(kinds)), np.nan)
    for module, (layer, kind) in places.items():
        for name, weight in weights[module].items():
            values[layers.index(layer), names.index(name) * len(kinds) + kinds.index(kind)] = weight
    heat_map(
        file,
        values,
        rows=layers,
        columns=[f"{name}: {kind}" for name in names for kind in kinds],
        title=f"Coefficients by module, merge: {method}",
        row_label="layer",
        column_label="adapter: module",
    )
    return [f"coefficients by module: {file}"]


def _place(module: str) -> tuple[str, str]:
    """Layer and kind of a module: ``model.layers.3.self_attn.q_proj`` -> 3, q_proj."""
    match = re.search(r"\.(\d+)\.(.+)$", module)
    return (match[1], match[2].rsplit(".", 1)[-1]) if match else ("", module)
