"""The curves of a run's training beside its record: ``curves.json`` and ``curves.png``, reused stages included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from recbole_llm.evaluation import plots
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
    drawn = {curve.name: (curve.unit, curve.points) for curve in curves if max(map(len, curve.points.values())) > 1}
    if not drawn:
        return None
    plots.curve_panels(folder / PICTURE, drawn, title=title)
    return folder / PICTURE
