"""Pictures are whole PNGs, whatever stands in their labels and tables, and need no display."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from recbole_llm.evaluation import plots

LABELS: dict[str, Any] = {"title": "shares", "row_label": "group", "column_label": "expert"}


def draw(file: Path, values: Any, rows: list[str] | None = None, **labels: Any) -> np.ndarray:
    """The pixels [H, W, 4] of a heat map of some values."""
    values = np.asarray(values, dtype=float)
    rows = rows or [f"group {row}" for row in range(len(values))]
    columns = [str(column) for column in range(values.shape[1])]
    plots.heat_map(file, values, rows=rows, columns=columns, **LABELS | labels)
    return imread(file)


def cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into cells from now on."""
    written: list[str] = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **style: written.append(s) or text(self, x, y, s, **style))
    return written


def test_a_heat_map_is_a_whole_png_that_shows_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = cells(monkeypatch)
    picture = draw(tmp_path / "map.png", [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    assert written == ["0.50", "0.25", "0.25", "0.00", "1.00", "0.00"]
    assert min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_a_cell_without_a_value_is_empty_and_long_labels_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    written = cells(monkeypatch)
    columns = ["target only: q_proj", "a hybrid of a long name: down_proj"]
    plots.heat_map(tmp_path / "map.png", np.array([[0.5, np.nan], [-0.25, 1.0]]), rows=["0", "1"], columns=columns, **LABELS)
    assert written == ["0.50", "-0.25", "1.00"] and not recwarn.list


def test_other_values_are_another_picture_and_the_same_ones_the_same(tmp_path: Path) -> None:
    one, same, other = (draw(tmp_path / "map.png", [[low, 1.0]]) for low in (0.25, 0.25, 0.75))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = draw(tmp_path / "map.png", [[0.5, 0.5]])

    def half(self: Figure, file: Any, **style: Any) -> None:
        (Path(file).write_bytes if isinstance(file, str | os.PathLike) else file.write)(b"\x89PNG")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space left"):
        draw(tmp_path / "map.png", [[1.0, 0.0]])
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert np.array_equal(imread(tmp_path / "map.png"), before)


@pytest.mark.parametrize("label", ["$", "$5 and $10_off", r"$\frac{1}{2}$", "a_b^c", "50 % {off}", "Café & Bücher", ""])
def test_labels_are_text_whatever_stands_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    modes: dict[str, Any] = {}
    parse = Text._preprocess_math

    def noted(self: Text, text: str) -> tuple[str, Any]:
        shown, mathematical = parse(self, text)
        modes[shown] = mathematical
        return shown, mathematical

    monkeypatch.setattr(Text, "_preprocess_math", noted)
    draw(tmp_path / "map.png", [[0.5, 0.5]], [label], title=label, row_label=label, column_label=label)
    assert not label or modes[label] is False
    assert not any(modes.values())


@pytest.mark.parametrize("values", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0]], [[0.3], [0.3]], [[0.0]]])
def test_tables_of_one_value_are_drawn_without_a_warning(tmp_path: Path, values: list[list[float]], recwarn: Any) -> None:
    picture = draw(tmp_path / "map.png", values)
    assert np.isfinite(picture).all() and not recwarn.list


@pytest.mark.slow
def test_no_display_is_needed_and_no_window_system_is_touched(tmp_path: Path) -> None:
    code = """
import sys, numpy
from recbole_llm.evaluation import plots
before = {name for name in sys.modules if name.startswith("matplotlib")}
plots.heat_map(sys.argv[1], numpy.eye(2), rows=["a", "b"], columns=["0", "1"], title="t", row_label="r", column_label="c")
print(sorted(before), "matplotlib.pyplot" in sys.modules)
"""
    kept = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment = {**kept, "MPLBACKEND": "TkAgg", "PYTHONPATH": str(Path(plots.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "map.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "False"]  # nor is matplotlib imported before a picture is wanted
    assert imread(tmp_path / "map.png").shape[2] == 4
