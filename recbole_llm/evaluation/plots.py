"""Pictures, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.store.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def picture(
    file: Path, size: tuple[float, float], *, dpi: int = 150, constrained: bool = True, formulas: bool = False
) -> Iterator[Figure]:
    """A figure of a size in inches, for the block to draw on; then written as PNG. With ``formulas``, ``$`` starts a formula."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which has global state

    with matplotlib.rc_context({"text.parse_math": formulas}):
        figure = Figure(figsize=size, layout="constrained" if constrained else None)
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=dpi)
    atomic_write(file, content.getvalue())


def heat_map(
    file: Path, values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str, row_label: str, column_label: str
) -> None:
    """Write values [R, C] as an annotated heat map (PNG); cells with NaN are empty."""
    longest = max(map(len, columns))
    turned = longest > 8
    size = 3 + 0.7 * len(columns), 1.2 + 0.4 * len(rows) + 0.08 * longest * turned  # inches; long labels are vertical
    with picture(file, size) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=min(0, np.nanmin(values)))
        axes.set_xticks(range(len(columns)), columns)
        if turned:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=title, xlabel=column_label, ylabel=row_label)
        middle = np.mean(image.get_clim())
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=axes)


def bars(
    file: Path, names: Sequence[str], heights: Mapping[str, Sequence[float]], *, title: str, row_label: str, column_label: str
) -> None:
    """Write groups of bars as a picture (PNG): for each of ``names`` [N], one bar of every entry [N] of ``heights``."""
    with picture(file, (max(6.0, 0.4 * len(names)), 4)) as figure:
        axes = figure.subplots()
        places, width = np.arange(len(names)), 0.8 / len(heights)
        for number, (name, values) in enumerate(heights.items()):
            axes.bar(places + (number - (len(heights) - 1) / 2) * width, values, width, label=name)
        axes.set_xticks(places, names)
        axes.set(title=title, xlabel=column_label, ylabel=row_label)
        axes.legend(frameon=False, fontsize=8)
