"""The figure of a forecast: one panel for each feature, the gain of each merge with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from recbole_llm.evaluation.plots import picture

_MARKS = (("o", "#1f5fae"), ("s", "#8a5a12"))  # of the mixtures


def draw_forecast(file: Path, panels: Mapping[str, Mapping[str, np.ndarray]], *, notes: Mapping[str, str], gain: str) -> None:
    """Write the figure (PNG).

    Args:
        panels: feature -> mixture -> [P, 4], the feature, the gain and the bounds of its interval of P merges.
        notes: a line above each panel, by feature.
        gain: the label of the vertical axis.
    """
    with picture(file, (2.9 * len(panels) + 0.6, 3.6)) as figure:
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (feature, mixtures) in zip(columns, panels.items(), strict=True):
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            for (name, points), (mark, colour) in zip(mixtures.items(), _MARKS, strict=True):
                x, y, low, high = points.reshape(-1, 4).T  # [P] each
                axes.errorbar(x, y, [y - low, high - y], fmt=mark, color=colour, ms=5, elinewidth=1, alpha=0.8, label=name)
            axes.set_title(notes[feature], fontsize=8)
            axes.set_xlabel(feature)
        columns[0].set_ylabel(gain)
        figure.legend(*columns[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_MARKS), frameon=False)
