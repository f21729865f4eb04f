"""Temperatures and calibration errors against short references."""

import math

import numpy as np
import pytest
import torch

from recbole_llm.merging.calibration import RANGE, confidence_and_accuracy, expected_calibration_error, temperature


def drawn(users: int, true_temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose targets are drawn from their softmax at a temperature."""
    rng = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(users, 10, generator=rng)
    return scores, torch.multinomial(torch.softmax(scores / true_temperature, -1), 1, generator=rng).squeeze(1)


@pytest.mark.parametrize("wanted", [0.5, 1.0, 4.0])
def test_the_temperature_is_that_of_the_draw_and_the_most_likely_one(wanted):
    scores, slots = drawn(4000, wanted)
    found = temperature(scores, slots)
    assert found == pytest.approx(wanted, rel=0.1)

    def loss(t):
        return -torch.log_softmax(scores.double() / t, -1).gather(1, slots[:, None]).mean().item()

    assert all(loss(found) <= loss(t) for t in found * np.array([0.5, 0.9, 0.99, 1.01, 1.1, 2.0]))


def test_the_temperature_of_one_adapter_scales_with_its_scores():
    scores, slots = drawn(300, 1.0)
    assert temperature(7 * scores, slots) == pytest.approx(7 * temperature(scores, slots), rel=1e-6)
    assert temperature(scores + torch.arange(300.0)[:, None], slots) == pytest.approx(temperature(scores, slots), rel=1e-4)


def test_temperatures_without_a_minimum_end_at_a_bound():
    scores = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    assert temperature(scores, scores.argmax(1)) == RANGE[0]  # always right
    assert temperature(scores, scores.argmin(1)) == RANGE[1]  # worse than chance
    assert temperature(torch.ones(5, 4), torch.zeros(5, dtype=torch.long)) == 1.0


def reference_error(confidence, correct, bins=15):
    edges, total = np.linspace(0, 1, bins + 1), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_the_calibration_error_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.3
    found = expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct))
    assert found == pytest.approx(reference_error(confidence, correct), abs=1e-12)
    assert expected_calibration_error(torch.ones(4), torch.tensor([True, True, False, False])) == 0.5


def test_one_temperature_calibrates_an_overconfident_adapter():
    scores, slots = drawn(3000, 3.0)
    report = confidence_and_accuracy(scores, slots)
    assert report["hit@1"] == pytest.approx((scores.argmax(1) == slots).double().mean().item())
    assert report["calibration_error"] > 0.2 and report["calibrated"]["calibration_error"] < 0.05
    assert report["calibrated"]["max_probability"] == pytest.approx(report["hit@1"], abs=0.03)
    assert report["calibrated"]["cross_entropy"] < report["cross_entropy"]
    uniform = confidence_and_accuracy(torch.zeros(6, 4), torch.arange(6) % 4)
    assert uniform["entropy"] == pytest.approx(math.log(4)) and uniform["max_probability"] == 0.25
