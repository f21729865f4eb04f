"""A curve has every point of a training once, whether the training was interrupted or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recbole_llm.store import curves, processes
from recbole_llm.store.contexts import holding
from recbole_llm.store.curves import Curve
from recbole_llm.store.processes import Processes
from recbole_llm.store.stages import Stage, StageCache, Work


class Interrupted(Exception):
    """Stands for a kill."""


def stage(until: int | None, start: int = 1) -> Stage:
    """A training of six steps that resumes from ``start`` and is interrupted after ``until``."""

    def build(work: Work) -> None:
        for step in range(start, 7):
            curves.record("loss", step, 1 / step)
            if step % 3 == 0:
                curves.record_valid(step, step / 10)
            if step == until:
                raise Interrupted

    return Stage("adapter", {"steps": 6}, build)


WHOLE = {"loss": [(step, 1 / step) for step in range(1, 7)], "valid NDCG@10": [(3, 0.3), (6, 0.6)]}


def test_an_interrupted_stage_has_the_curve_of_a_whole_one(tmp_path: Path) -> None:
    cache, said = StageCache(tmp_path, seed=0), []
    with curves.reporting(lambda *point: said.append(point), "NDCG@10"):
        with pytest.raises(Interrupted):
            cache.run(stage(until=5))
        folder = cache.run(stage(until=None, start=4))  # its last checkpoint was after step 3
    found = Curve.read(folder, "adapter")
    assert found is not None and found.points == WHOLE and found.unit == "step"
    assert not [*tmp_path.rglob("*.jsonl")]
    with curves.reporting(lambda *point: said.append("again"), "NDCG@10"):
        assert cache.run(stage(until=None)) == folder  # reused
    assert "again" not in said
    # the second process says all of the first one's points again, which Reports drops: it may be of another run
    assert [point[2] for point in said if point[1] == "loss"] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]


def test_a_last_line_that_is_not_whole_is_computed_again(tmp_path: Path) -> None:
    journal = tmp_path / "curve.jsonl"
    journal.write_text('["loss", 1, 0.5, "step"]\n["loss", 2, 0.')
    with curves.recording("stage", journal) as curve:
        curves.record("loss", 2, 0.25)
    assert curve.points == {"loss": [(1, 0.5), (2, 0.25)]}
    assert journal.read_text() == '["loss", 1, 0.5, "step"]\n["loss", 2, 0.25, "step"]\n'


def test_what_is_no_number_is_no_point() -> None:
    curve = Curve("stage")
    assert [curve.add("loss", step, value) for step, value in ((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0))] == [
        True,
        False,
        False,
        True,
    ]
    assert curve.points == {"loss": [(1, 1.0), (4, 2.0)]}


def test_a_stage_inside_a_run_has_its_own_curve(tmp_path: Path) -> None:
    with curves.recording("model") as outer:
        curves.record("loss", 0, 2.0, "epoch")
        StageCache(tmp_path, seed=0).run(stage(until=None))
        curves.record("loss", 1, 1.0, "epoch")
    assert outer.points == {"loss": [(0, 2.0), (1, 1.0)]} and outer.unit == "epoch"


def test_without_a_training_nothing_is_recorded_and_nothing_is_written(tmp_path: Path) -> None:
    curves.record("loss", 1, 1.0)
    folder = StageCache(tmp_path, seed=0).run(Stage("merge", {}, lambda work: None))
    assert not (folder / curves.FILE).exists() and Curve.read(folder, "merge") is None


def test_process_0_records_for_all(tmp_path: Path) -> None:
    with holding(processes._current, Processes(1, 2)), curves.recording("stage", tmp_path / "curve.jsonl") as curve:
        curves.record("loss", 1, 1.0)
    assert not curve.points and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("total", [1, 7, 199, 200, 201, 1000, 12345])
def test_a_curve_has_a_bounded_number_of_points_and_the_last_step(total: int) -> None:
    steps = [step for step in range(1, total + 1) if curves.is_point(step, total)]
    assert steps[-1] == total and min(total, curves.POINTS // 2) <= len(steps) <= curves.POINTS + 1


@pytest.mark.parametrize("text", ["[]", '{"unit": "step"}', '{"unit": "step", "points": {"loss": [1]}}', "{", '{"points": 3}'])
def test_a_curve_that_cannot_be_read_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / curves.FILE).write_text(text)
    assert Curve.read(tmp_path, "stage") is None
    assert "not a curve that can be drawn" in caplog.text


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    curve = Curve("stage", "epoch", {"loss": [(0, 1.5), (1, 0.1)]})
    curve.write(tmp_path)
    assert json.loads((tmp_path / curves.FILE).read_text()) == {"unit": "epoch", "points": {"loss": [[0, 1.5], [1, 0.1]]}}
    assert Curve.read(tmp_path, "stage") == curve
