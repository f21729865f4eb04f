"""The curves of a run's training beside its record: ``curves.json`` and ``curves.png``, reused stages included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_llm.evaluation.plots import picture
from recbole_llm.store.curves import Curve
from recbole_llm.store.files import atomic_write

NUMBERS, PICTURE = "curves.json", "curves.png"


def write_curves(folder: Path, stages: Mapping[str, Path], own: Curve, title: str) -> Path | None:
    """Write the curves of a run; returns the picture, or None if no curve has two points.

    Args:
        folder: of the run record.
        stages: the folder of each stage.
        own: of the model, if RecBole's trainer trained it.
    """
    found = [Curve.read(stage, name) for name, stage in stages.items()]
    curves = [curve for curve in (*found, own) if curve is not None and any(curve.points.values())]
    if not curves:
        return None
    atomic_write(folder / NUMBERS, json.dumps({curve.name: curve.plain() for curve in curves}))
    drawn = [curve for curve in curves if max(map(len, curve.points.values())) > 1]
    if not drawn:
        return None
    draw(folder / PICTURE, drawn, title)
    return folder / PICTURE


def draw(file: Path, curves: Sequence[Curve], title: str) -> None:
    """Write one panel for each curve as a picture (PNG): losses on the left scale, all others on the right one."""
    wide = min(3, len(curves))
    high = -(-len(curves) // wide)
    width, height = 4.8 * wide, 0.5 + 3.2 * high  # inches
    with picture(file, (width, height), constrained=False, dpi=100) as figure:  # which would take as long as all the rest
        margins = {"left": 1 / width, "right": 1 - 0.8 / width, "bottom": 0.6 / height, "top": 1 - 0.8 / height}
        figure.subplots_adjust(**margins, wspace=0.65, hspace=0.5)
        for panel, curve in zip(figure.subplots(high, wide, squeeze=False).flat, curves, strict=False):
            panel.set(title=curve.name, xlabel=curve.unit)
            left = [line for line in curve.points if line.startswith("loss")]
            right = [line for line in curve.points if line not in left]
            shown = []
            for scale, own, marker, colour in ((panel, left, "", 0), (panel.twinx() if left and right else panel, right, "o", 3)):
                for number, line in enumerate(own):
                    places, heights = zip(*curve.points[line], strict=True)
                    style = {"color": f"C{colour + number}", "markersize": 3, "linewidth": 1}
                    shown += scale.plot(places, heights, marker="o" if len(places) == 1 else marker, label=line, **style)
                if own:
                    scale.set_ylabel(", ".join(own))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(handles=shown, loc="upper right", fontsize=7)
        for panel in figure.axes[len(curves) : high * wide]:
            panel.set_visible(False)
        figure.suptitle(title)
