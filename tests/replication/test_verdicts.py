"""Each rule from a result to a verdict, on numbers made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recbole_llm.evaluation import significance
from recbole_llm.replication.claims import BETTER, EQUAL, NOT_WORSE
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN, adjusted, users_needed, verdict


def one(low: float, high: float) -> dict[str, Any]:
    return {"interval": [low, high]}


@pytest.mark.parametrize(
    ("interval", "p", "said"),
    [
        ((0.011, 0.09), 0.01, HOLDS),
        ((0.011, 0.09), 0.2, OPEN),  # the interval alone does not count after many tests
        ((-0.001, 0.09), 0.01, OPEN),
        ((-0.05, 0.021), 0.9, OPEN),  # a difference of the margin is not excluded
        ((-0.05, 0.019), 0.9, FAILS),
        ((-0.05, -0.01), 0.001, FAILS),
        ((0.001, 0.019), 0.001, FAILS),  # a gain, but smaller than what would support the claim
    ],
)
def test_a_difference(interval: tuple[float, float], p: float, said: str) -> None:
    assert verdict([one(*interval)], 0.02, BETTER, [p]) == said


@pytest.mark.parametrize(
    ("interval", "said"),
    [((-0.01, 0.019), HOLDS), ((-0.021, 0.01), OPEN), ((0.01, 0.03), OPEN), ((0.021, 0.03), FAILS), ((-0.04, -0.021), FAILS)],
)
def test_an_equality(interval: tuple[float, float], said: str) -> None:
    assert verdict([one(*interval)], 0.02, EQUAL, [None]) == said


@pytest.mark.parametrize(("interval", "said"), [((-0.019, 0.1), HOLDS), ((-0.021, 0.1), OPEN), ((-0.1, -0.021), FAILS)])
def test_a_row_that_is_not_worse(interval: tuple[float, float], said: str) -> None:
    assert verdict([one(*interval)], 0.02, NOT_WORSE, [None]) == said


def test_a_claim_of_several_comparisons_needs_all_of_them() -> None:
    good, bad, between = one(0.05, 0.1), one(-0.1, 0.0), one(-0.1, 0.1)
    assert verdict([good, good], 0.02, BETTER, [0.01, 0.01]) == HOLDS
    assert verdict([good, between], 0.02, BETTER, [0.01, 0.5]) == OPEN
    assert verdict([between, bad, good], 0.02, BETTER, [0.5, 0.5, 0.01]) == FAILS


def test_p_values_of_the_page_are_one_family() -> None:
    assert adjusted({"a": 0.01, "b": 0.04}) == pytest.approx({"a": 0.02, "b": 0.04})
    assert adjusted({}) == {}


def test_the_users_that_decide_have_the_power() -> None:
    test = {"users": 500, "deviation": 0.3}
    needed = users_needed(test, 0.02)
    assert significance.detectable_difference(0.3, needed) <= 0.02 < significance.detectable_difference(0.3, needed - 1)
    rng = np.random.default_rng(0)  # a difference of .02 is found in about 80 % of samples of that size
    means = rng.normal(0.02, 0.3, (300, needed)).mean(axis=1)
    assert 0.7 < np.mean(np.abs(means) > 1.96 * 0.3 / np.sqrt(needed)) < 0.9
