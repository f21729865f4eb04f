"""One picture of a dataset: interactions per user, popularity of items, interactions over time, lengths of titles."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.data.times import dates
from recbole_llm.describe.facts import Description
from recbole_llm.evaluation.plots import picture

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

    with picture(file, (9, 6.4), formulas=True) as figure:  # marks of logarithmic axes are powers
        users, items, times, titles = figure.subplots(2, 2).flat
        edges = np.unique(np.geomspace(1, found.per_user.max(initial=1) + 1, _BARS).round())
        users.hist(found.per_user, edges.tolist())
        users.set_xscale("log")
        users.set(xlabel="interactions of a user", ylabel="users")
        items.loglog(np.arange(1, len(found.per_item) + 1), np.sort(found.per_item)[::-1])
        items.set(xlabel="items, most popular first", ylabel="interactions")
        _draw_times(times, found.times)
        if found.titles is None:
            _say(titles, "no titles")
        else:
            titles.hist(found.titles.tokens, np.arange(0.5, found.titles.tokens.max(initial=1) + 1).tolist())
            titles.axvline(found.titles.limit + 0.5, color="gray", linestyle=":", label="max_title_tokens")
            titles.legend(frameon=False, fontsize=8)
            titles.set(xlabel=f"tokens of a title ({found.titles.tokenizer})", ylabel="items")
        figure.suptitle(f"{found.passport['dataset']}: {sizes}", parse_math=False)


def _draw_times(axes: Axes, times: np.ndarray | None) -> None:
    moments = dates(times) if times is not None else None
    if times is None:
        _say(axes, "no column of times")
    elif moments is None:
        axes.hist(times, _BARS)
        axes.set(xlabel="time, which is no date", ylabel="interactions")
    else:
        heights, edges = np.histogram(moments, _BARS)
        days = [datetime.fromtimestamp(edge, UTC) for edge in edges.tolist()]
        axes.stairs(heights, days, fill=True)  # type: ignore[arg-type]
        axes.tick_params(axis="x", labelrotation=30)
        axes.set(xlabel="time", ylabel="interactions")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
