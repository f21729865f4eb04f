"""Rank correlation and regret against short references."""

import numpy as np
import pytest
import torch
from scipy import stats

from recbole_llm.merging.lattice import Lattice, least
from recbole_llm.merging.lattice_report import lattice_report, rank_correlation, regret


def lattice(values: torch.Tensor, **more) -> Lattice:
    """Two adapters at 5 points, with validation metrics [5, N]."""
    first = torch.tensor([0.5, 1.0, 0.0, 0.25, 0.75])
    weights = torch.stack([first, 1 - first], dim=1)
    users = values.shape[1]
    scores = more.pop("scores", torch.zeros(5, users, 4))
    return Lattice(["uniform", "single", "single", "grid", "grid"], weights, scores, torch.zeros(users, dtype=torch.long), values)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (20, 7)).astype(float), rng.random((20, 7))  # with ties
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlation(one, other), expected)
    assert np.isnan(rank_correlation(np.ones((1, 7)), other[:1]))[0]


def test_regret_is_the_best_minus_the_chosen():
    assert regret(np.array([[3.0, 1.0, 2.0]]), np.array([[0.5, 0.2, 0.3]]))[0] == pytest.approx(0.3)
    assert regret(np.array([[3.0, 1.0, 2.0]]), np.array([[0.2, 0.5, 0.3]]))[0] == 0


def test_a_report_of_a_criterion_that_finds_the_best_and_of_one_that_finds_the_worst():
    generator = torch.Generator().manual_seed(0)
    quality = torch.tensor([0.5, 0.3, 0.9, 0.7, 0.4])[:, None]
    values = quality + 0.01 * torch.randn(5, 200, generator=generator)
    report = lattice_report(lattice(values), {"good": -values, "bad": values, "flat": torch.ones(5, 200)}, ["a", "b"])
    good, bad, flat = (report["criteria"][name] for name in ("good", "bad", "flat"))
    assert (good["rank_correlation"]["value"], bad["rank_correlation"]["value"]) == pytest.approx((-1, 1))
    assert good["regret"]["value"] == 0 and bad["regret"]["value"] == pytest.approx(0.6, abs=0.01)
    assert bad["regret"]["interval"][0] < bad["regret"]["value"] < bad["regret"]["interval"][1]
    assert report["better_single"] == "b" and report["best"] == good["least"] == 2 and bad["least"] == 1
    assert bad["above_single"]["value"] == pytest.approx(-0.6, abs=0.01) and good["above_single"]["value"] == 0
    assert flat["rank_correlation"] == {"value": None, "interval": None}
    assert flat["least"] == 0  # the most even of equal points
    low, high = report["points"][2]["interval"]
    assert low < report["points"][2]["score"] < high and report["points"][3]["weights"] == {"a": 0.25, "b": 0.75}


def test_intervals_are_those_of_resampled_users():
    values = torch.rand(5, 60, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    criterion = torch.rand(5, 60, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    report = lattice_report(lattice(values), {"c": criterion}, ["a", "b"], seed=3)
    drawn = np.random.default_rng(9).integers(0, 60, (400, 60))  # users
    pairs = [(criterion[:, users].mean(1), values[:, users].mean(1)) for users in drawn]
    expected = {
        "rank_correlation": [stats.spearmanr(c, v).statistic for c, v in pairs],
        "regret": [float(v.max() - v[c.argmin()]) for c, v in pairs],
    }
    for name, tolerance in (("rank_correlation", 0.15), ("regret", 0.03)):
        bounds = np.quantile(expected[name], [0.025, 0.975])
        np.testing.assert_allclose(report["criteria"]["c"][name]["interval"], bounds, atol=tolerance)


def test_least_prefers_even_weights():
    assert least(torch.tensor([1.0, 0.5, 0.5]), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])) == 2
