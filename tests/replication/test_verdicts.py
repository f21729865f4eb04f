"""Each rule from a result to a verdict, on numbers made for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recbole_llm.evaluation import significance
from recbole_llm.replication.claims import BETTER, EQUAL, NOT_WORSE, Side
from recbole_llm.replication.measure import _test
from recbole_llm.replication.verdicts import FAILS, HOLDS, OPEN, adjusted, interval, users_needed, verdict


def one(low: float, high: float) -> dict[str, Any]:
    return {"interval": [low, high], "users": 500, "deviation": 0.3, "difference": 0.1, "differing": 90}


def tied(users: int, differing: int | None = 0) -> dict[str, Any]:
    """Two rows that differ for no sampled user, whose bootstrap has no width."""
    return {"interval": [0.0, 0.0], "users": users, "deviation": 0.0, "difference": 0.0, "differing": differing}


@pytest.mark.parametrize("differing", [0, None])  # None: a result that does not say so
def test_users_who_do_not_differ_do_not_show_that_none_does(differing: int | None) -> None:
    """Of 28 users, a share of 12 % may differ unseen; of 500, .7 %; of 2, nearly all."""
    for users, said in ((2, OPEN), (28, OPEN), (500, HOLDS)):
        assert verdict([tied(users, differing)], 0.01, NOT_WORSE, [1.0]) == said
        assert verdict([tied(users, differing)], 0.01, EQUAL, [None]) == said
        assert verdict([tied(users, differing)], 0.01, BETTER, [1.0]) == (FAILS if said == HOLDS else OPEN)
    assert interval(tied(28)) == pytest.approx((-0.1234, 0.1234), abs=1e-4)
    needed = users_needed(tied(28), 0.01)
    assert interval(tied(needed))[1] <= 0.01 < interval(tied(needed - 1))[1]


def test_few_users_who_differ_make_the_interval_wider_and_many_do_not() -> None:
    few, many = ({"interval": [0.01, 0.05], "users": 100, "differing": number} for number in (4, 5))
    assert interval(many) == (0.01, 0.05)
    assert interval(few) == pytest.approx((0.01 - 0.0593, 0.05 + 0.0593), abs=1e-3)
    chance = {"interval": [0.013, 0.05], "users": 100, "deviation": 0.0, "difference": 0.05, "differing": None}
    assert interval({"interval": [-0.2, 0.9], "users": 6, "differing": 2})[1] == 1.0, "no difference is larger"
    assert interval(chance) == (0.013, 0.05)  # against a number: exact already


@pytest.mark.parametrize("kind", [BETTER, NOT_WORSE, EQUAL])
def test_a_few_users_with_equal_differences_decide_nothing(kind: str) -> None:
    """Three targets at rank 2, beside chance and beside rank 1; of many users, one difference is enough."""

    def said(value: float, other: float, users: int) -> str:
        found = set[str]()
        for number in (True, False):
            sides = {"new": np.full(users, value), "old": other if number else np.full(users, other)}
            runs: Any = SimpleNamespace(side=lambda side, own=sides: own[side.label or "old"], chance=lambda: None)
            test = _test(runs, Side("new"), Side(number=other) if number else Side("old"))
            found.add(verdict([test], 0.02, kind, [test["p_value"]]))
        (one,) = found
        return one

    assert said(0.63, 0.23, 3) == said(0.63, 0.97, 3) == OPEN
    assert said(0.63, 0.23, 500) == (FAILS if kind == EQUAL else HOLDS) and said(0.63, 0.97, 500) == FAILS


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
    test = {"users": 500, "deviation": 0.3, "difference": 0.02}
    needed = users_needed(test, 0.02)
    assert significance.detectable_difference(0.3, needed) <= 0.02 < significance.detectable_difference(0.3, needed - 1)
    rng = np.random.default_rng(0)  # a difference of .02 is found in about 80 % of samples of that size
    means = rng.normal(0.02, 0.3, (300, needed)).mean(axis=1)
    assert 0.7 < np.mean(np.abs(means) > 1.96 * 0.3 / np.sqrt(needed)) < 0.9
