"""Plots for the run folder, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_llm.store.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def two_scales(
    file: Path,
    axis: Sequence[float],
    left: Mapping[str, Sequence[float]],
    right: tuple[Sequence[float], Sequence[Sequence[float]]],
    *,
    title: str,
    axis_label: str,
    left_label: str,
    right_label: str,
) -> None:
    """Write named values [P] over an axis [P], and over the same axis one more [P] with intervals [P, 2], as a plot (PNG).

    The points may be in any order. The named values are on the left scale, the other on the right one.
    """
    order = np.argsort(axis, kind="stable")
    places = np.asarray(axis, dtype=float)[order]
    with picture(file, (7, 4.5)) as figure:
        axes = figure.subplots()
        shown = []
        for (name, values), style in zip(left.items(), ("-o", "--s", ":^"), strict=False):
            shown += axes.plot(places, np.asarray(values)[order], style, color="tab:blue", markersize=4, label=name)
        other = axes.twinx()
        middle, intervals = (np.asarray(part, dtype=float)[order] for part in right)
        shown += other.plot(places, middle, "-D", color="tab:red", markersize=4, label=right_label)
        other.fill_between(places, intervals[:, 0], intervals[:, 1], color="tab:red", alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel=axis_label, ylabel=left_label)
        other.set_ylabel(right_label)
        axes.legend(handles=shown, loc="best", fontsize=8)


def lines(
    file: Path,
    places: Sequence[float],
    heights: Mapping[str, Sequence[float]],
    *,
    bands: Mapping[str, Sequence[float]],
    mark: float,
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Write lines over ``places`` [S] as a picture (PNG).

    Args:
        heights: [S] of each line, by name.
        bands: half widths [S] of intervals around some of the lines.
        mark: where a vertical line stands.
    """
    with picture(file, (6, 4)) as figure:
        axes = figure.subplots()
        for name, values in heights.items():
            (line,) = axes.plot(places, values, "-" if name in bands else "--", label=name)
            if name in bands:
                low, high = (np.asarray(values) + sign * np.asarray(bands[name]) for sign in (-1, 1))
                axes.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        axes.axvline(mark, color="gray", linewidth=1, linestyle=":")
        axes.set(title=title, xlabel=column_label, ylabel=row_label)
        axes.legend(frameon=False)


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


def curve_panels(
    file: Path, curves: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, float]]]]], *, title: str
) -> None:
    """Write one panel for each entry of ``curves`` as a picture (PNG): losses on the left scale, all others on the right one.

    Args:
        curves: name of a panel -> label of its axis, and points (place, height) by the name of their line.
    """
    wide = min(3, len(curves))
    high = -(-len(curves) // wide)
    width, height = 4.8 * wide, 0.5 + 3.2 * high  # inches
    with picture(file, (width, height), constrained=False, dpi=100) as figure:  # which would take as long as all the rest
        margins = {"left": 1 / width, "right": 1 - 0.8 / width, "bottom": 0.6 / height, "top": 1 - 0.8 / height}
        figure.subplots_adjust(**margins, wspace=0.65, hspace=0.5)
        grid = figure.subplots(high, wide, squeeze=False).flat
        for panel, (name, (axis_label, lines)) in zip(grid, curves.items(), strict=False):
            panel.set(title=name, xlabel=axis_label)
            left = [line for line in lines if line.startswith("loss")]
            right = [line for line in lines if line not in left]
            shown = []
            for scale, own, marker, colour in ((panel, left, "", 0), (panel.twinx() if left and right else panel, right, "o", 3)):
                for number, line in enumerate(own):
                    places, heights = zip(*lines[line], strict=True)
                    style = {"color": f"C{colour + number}", "markersize": 3, "linewidth": 1}
                    shown += scale.plot(places, heights, marker="o" if len(places) == 1 else marker, label=line, **style)
                if own:
                    scale.set_ylabel(", ".join(own))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(handles=shown, loc="upper right", fontsize=7)
        for panel in figure.axes[len(curves) : high * wide]:
            panel.set_visible(False)
        figure.suptitle(title)


def intervals(
    file: Path,
    groups: Mapping[str, Sequence[tuple[str, str, float, tuple[float, float]]]],
    *,
    kinds: Mapping[str, tuple[str, str]],
    linear: float,
    title: str,
    column_label: str,
) -> None:
    """Write values with their intervals, one below another in named groups, as a picture (PNG).

    Args:
        groups: name -> (label, kind, value, (low, high)) of each row, from above.
        kinds: kind -> colour and marker of its rows.
        linear: up to this distance from 0 the axis is linear, and logarithmic beyond; its marks are multiples of it.
    """
    rows = sum(map(len, groups.values())) + len(groups)
    height = 1.2 + 0.19 * rows  # inches
    with picture(file, (9, height), constrained=False, dpi=110) as figure:  # fixed margins, as in curve_panels
        figure.subplots_adjust(left=0.52, right=0.97, bottom=0.6 / height, top=1 - 0.6 / height)
        axes = figure.subplots()
        place, places, names, shown = 0, [], [], {}
        for group, own in groups.items():
            heading: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8, "weight": "bold"}
            axes.text(-0.02, -place, group, transform=axes.get_yaxis_transform(), **heading)
            for label, kind, value, ends in own:
                place += 1
                places.append(-place)
                names.append(label)
                colour, marker = kinds[kind]
                axes.plot(ends, (-place, -place), color=colour, linewidth=1)
                (shown[kind],) = axes.plot(value, -place, marker, color=colour, markersize=4, linestyle="none", label=kind)
            place += 1
        axes.set_yticks(places, names, fontsize=7)
        axes.set_xscale("symlog", linthresh=linear)
        marks = [sign * linear * share for share in (0.4, 1, 2, 4, 8, 16) for sign in (-1, 1)]
        low, high = axes.get_xlim()
        axes.set_xticks([0, *(mark for mark in marks if low <= mark <= high)], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:+.2g}")
        axes.axvline(0, color="gray", linewidth=1, linestyle=":")
        axes.set(ylim=(-place, 1))
        axes.set_xlabel(column_label, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.legend(
            handles=[shown[kind] for kind in kinds if kind in shown],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            fontsize=7,
            ncols=3,
        )
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)


def panels(file: Path, drawings: Sequence[Callable[[Axes], None]], *, title: str) -> None:
    """Write drawings, each on axes of its own, as one picture (PNG), two in a row."""
    rows = -(-len(drawings) // 2)
    with picture(file, (9, 3.2 * rows), formulas=True) as figure:  # marks of logarithmic axes are powers
        for draw, axes in zip(drawings, figure.subplots(rows, 2, squeeze=False).flat, strict=False):
            draw(axes)
        figure.suptitle(title, parse_math=False)
