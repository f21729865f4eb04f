"""The curve of a cascade: its ends are the two models, and its break-even point is where routing more users buys nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from recbole_llm.evaluation.routing_curve import RoutingCurve

USERS = 400


def curve(gains: np.ndarray, priority: np.ndarray, steps: int = 10) -> RoutingCurve:
    cheap = np.random.default_rng(0).random(len(gains)) / 2
    return RoutingCurve.of("ndcg@10", cheap, cheap + gains, priority, steps=steps, cpu_seconds=(0.001, 0.02))


def test_the_ends_are_the_two_models_and_each_point_has_its_first_users_routed() -> None:
    gains, priority = np.random.default_rng(1).normal(0, 0.1, USERS), np.random.default_rng(2).random(USERS)
    found = curve(gains, priority)
    cheap = np.random.default_rng(0).random(USERS) / 2
    assert [point.share for point in found.points] == pytest.approx(np.linspace(0, 1, 11))
    for point in found.points:
        routed = np.argsort(-priority)[: round(point.share * USERS)]
        own = cheap.copy()
        own[routed] += gains[routed]
        assert point.value == pytest.approx(own.mean()) and point.gain == pytest.approx(own.mean() - cheap.mean())
        assert point.half_width == pytest.approx(1.96 * own.std() / np.sqrt(USERS))
        assert point.random == pytest.approx(cheap.mean() + point.share * gains.mean())
        assert point.oracle >= point.value - 1e-12 and point.cpu_seconds == pytest.approx(1 + 20 * point.share)
    assert found.points[0].gain == 0 and found.points[-1].oracle == pytest.approx(found.points[-1].value)
    assert (
        found.oracle[0] == pytest.approx(cheap.mean() + gains.clip(min=0).mean())
        and found.as_dict()["oracle"]["uses_test_targets"]
    )


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (lambda place: np.where(place < USERS // 4, 0.3, 0.0), 0.3),  # between 20 and 30 %
        (lambda place: np.where(place < USERS // 2, 0.3, -0.3), 0.5),
        (lambda place: np.full(USERS, 0.3), 1.0),
        (lambda place: np.full(USERS, -0.3), 0.0),
        (lambda place: np.zeros(USERS), 0.0),
    ],
)
def test_no_larger_share_is_superior_to_the_break_even_point(gain: object, expected: float) -> None:
    found = curve(gain(np.arange(USERS)), -np.arange(USERS))  # type: ignore[operator]
    assert found.break_even == pytest.approx(expected)
    assert ("no share of routed users" in found.verdict()) == (expected == 0)


def test_few_users_have_one_point_each() -> None:
    found = curve(np.array([0.1, -0.1, 0.2]), np.arange(3.0))
    assert [point.share for point in found.points] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_curve_is_written_as_csv_and_picture_and_printed(tmp_path: Path) -> None:
    found = curve(np.random.default_rng(1).normal(0.05, 0.1, USERS), np.arange(USERS))
    table, verdict = found.write(tmp_path, "SASRec, and TALLRec")
    rows = [*csv.DictReader((tmp_path / "routing.csv").open())]
    assert [float(row["value"]) for row in rows] == [point.value for point in found.points]
    assert imread(tmp_path / "routing.png").ndim == 3
    assert "at random" in table and "100%" in table and verdict.startswith("break-even: ")
    plain = RoutingCurve.of("hit@1", np.zeros(5), np.ones(5), np.arange(5), steps=5)
    assert plain.points[-1].cpu_seconds is None and "+1.0000" in plain.table()
