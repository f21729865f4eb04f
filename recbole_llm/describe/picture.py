"""One picture of a dataset: interactions per user, popularity of items, interactions over time, lengths of titles."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.data.times import dates
from recbole_llm.describe.facts import Description
from recbole_llm.evaluation import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = 30


def check_ending(file: Path) -> None:
    """Refuse a file that is no PNG."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"--picture={file}: the picture is a PNG file; give a name such as {file.with_suffix('.png')}")


def draw(found: Description, file: Path) -> None:
    """Write the picture as PNG.

    Raises:
        ValueError: the name of the file has another ending.
    """
    check_ending(file)
    counts = found.passport["counts"]
    sizes = ", ".join(f"{counts[name]:,} {name}" for name in ("users", "items", "interactions"))

    def users(axes: Axes) -> None:
        _bars(axes, found.per_user)
        axes.set(xlabel="interactions of a user", ylabel="users")

    def items(axes: Axes) -> None:
        axes.loglog(np.arange(1, len(found.per_item) + 1), np.sort(found.per_item)[::-1])
        axes.set(xlabel="items, most popular first", ylabel="interactions")

    def times(axes: Axes) -> None:
        moments = dates(found.times) if found.times is not None else None
        if found.times is None:
            _say(axes, "no column of times")
        elif moments is None:
            axes.hist(found.times, _BARS)
            axes.set(xlabel="time, which is no date", ylabel="interactions")
        else:
            heights, edges = np.histogram(moments, _BARS)
            days = [datetime.fromtimestamp(edge, UTC) for edge in edges.tolist()]
            axes.stairs(heights, days, fill=True)  # type: ignore[arg-type]
            axes.tick_params(axis="x", labelrotation=30)
            axes.set(xlabel="time", ylabel="interactions")

    def titles(axes: Axes) -> None:
        if found.titles is None:
            return _say(axes, "no titles")
        axes.hist(found.titles.tokens, np.arange(0.5, found.titles.tokens.max(initial=1) + 1).tolist())
        axes.axvline(found.titles.limit + 0.5, color="gray", linestyle=":", label="max_title_tokens")
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel=f"tokens of a title ({found.titles.tokenizer})", ylabel="items")

    plots.panels(file, [users, items, times, titles], title=f"{found.passport['dataset']}: {sizes}")


def _bars(axes: Axes, values: np.ndarray) -> None:
    """A histogram of counts on a logarithmic scale."""
    edges = np.unique(np.geomspace(1, values.max(initial=1) + 1, _BARS).round())
    axes.hist(values, edges.tolist())
    axes.set_xscale("log")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
