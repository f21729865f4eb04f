"""Pictures for the run folder, drawn by matplotlib without a display, and written whole."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recbole_llm.store.files import atomic_write


def heat_map(
    file: Path, values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str, row_label: str, column_label: str
) -> None:
    """A table of numbers [R, C] as a PNG, each written into its cell; where there is none (NaN), the cell is empty."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    longest = max(map(len, columns))
    turned = longest > 8
    size = 3 + 0.7 * len(columns), 1.2 + 0.4 * len(rows) + 0.08 * longest * turned  # inches; long labels stand upright
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=min(0, np.nanmin(values)))
    axes.set_xticks(range(len(columns)), [_plain(column) for column in columns])
    if turned:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_yticks(range(len(rows)), [_plain(row) for row in rows])
    axes.set(title=_plain(title), xlabel=_plain(column_label), ylabel=_plain(row_label))
    middle = np.mean(image.get_clim())
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < middle else "black", fontsize=8)
    figure.colorbar(image, ax=axes)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    atomic_write(file, picture.getvalue())


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics in what people call their categories
