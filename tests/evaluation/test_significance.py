"""Paired tests, intervals, false discovery rate and power, against exact counts and worked numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from recbole_llm.evaluation import significance
from recbole_llm.evaluation.significance import (
    adjusted,
    compare,
    detectable_difference,
    interval,
    permutation_p,
)


def hits(users: int, share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(users) < share).astype(float)


def by_hand(differences: np.ndarray) -> float:
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return float(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9))


@pytest.mark.parametrize("values", [hits(943, 0.3, 1), np.random.default_rng(2).random(943)])
def test_identical_scores_give_p_one_exactly(values: np.ndarray) -> None:
    found = compare(values, values.copy())
    assert found.p_value == 1.0 and found.higher is None and found.difference == 0 and found.deviation == 0


def test_rounding_of_averages_is_no_difference() -> None:
    assert compare([0.1 + 0.2, 0.1 + 0.2], [0.3, 0.3]).deviation == 0
    assert compare([1.0], [0.0]).p_value == 1.0  # nor is a single user evidence


@pytest.mark.parametrize("continuous", [False, True])
def test_the_direction_is_that_of_the_means(continuous: bool) -> None:
    worse = hits(943, 0.2, 3)
    better = np.maximum(worse, hits(943, 0.1, 4)) + (np.random.default_rng(0).random(943) * 1e-3 if continuous else 0)
    up, down = compare(better, worse), compare(worse, better)
    assert up.higher == "first" and down.higher == "second" and up.difference == -down.difference > 0
    assert up.p_value == down.p_value < 0.001


@pytest.mark.parametrize("users", [5, 10, 200])
def test_neither_the_order_of_arguments_nor_of_users_matters(users: int) -> None:
    rng = np.random.default_rng(users)
    first, second, order = rng.random(users), rng.random(users), rng.permutation(users)
    p = compare(first, second).p_value
    assert compare(second, first).p_value == p
    assert compare(first[order], second[order]).p_value == pytest.approx(p, abs=1e-12)
    assert 0 < p <= 1 and compare(first, second).p_value == p


@pytest.mark.parametrize("seed", range(8))
def test_few_users_are_enumerated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for differences in (rng.normal(0.5, 1, 9), rng.integers(-3, 4, 9) / 3, rng.integers(-1, 2, 9) / 1.0):
        assert permutation_p(differences) == pytest.approx(by_hand(differences[differences != 0]), abs=1e-9)


def test_of_hits_only_discordant_users_matter() -> None:
    differences = np.repeat([1.0, -1.0, 0.0], [120, 80, 5000])
    assert permutation_p(differences) == pytest.approx(stats.binomtest(120, 200).pvalue, rel=1e-9)
    assert permutation_p(differences[:200]) == permutation_p(differences)


def test_hits_averaged_over_seeds_are_exact_and_agree_with_flips() -> None:
    shares = [0.05] * 3 + [0.66, 0.05, 0.06, 0.08]
    differences = np.random.default_rng(5).choice(np.arange(-3, 4) / 3, 300, p=shares)
    magnitudes = np.abs(differences[differences != 0])
    sampled = significance._sampled_p(magnitudes, abs(differences.sum()), 200_000, 1)
    assert permutation_p(differences, flips=1) == pytest.approx(sampled, abs=4 * np.sqrt(sampled / 200_000))


def test_many_users_take_little_work() -> None:
    rng = np.random.default_rng(6)
    assert permutation_p(rng.normal(0, 1, 22_363), flips=300) > 1 / 301
    assert compare(hits(22_363, 0.30, 7), hits(22_363, 0.35, 8)).p_value < 1e-6


def test_type_one_error_of_sampled_flips_is_five_percent() -> None:
    rng = np.random.default_rng(7)
    p_values = [permutation_p(differences, flips=399, seed=seed) for seed, differences in enumerate(rng.normal(size=(2000, 25)))]
    assert abs(np.mean(np.array(p_values) <= 0.05) - 0.05) <= 0.01


def test_type_one_error_of_hits_is_at_most_five_percent_and_as_near_as_whole_users_let_it() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.random((2, 2000, 1000)) < 0.3  # both at .3: about 420 discordant users
    p_values = np.array([permutation_p(differences) for differences in first.astype(float) - second])
    assert 0.04 <= np.mean(p_values <= 0.05) <= 0.06


def test_benjamini_hochberg_by_hand() -> None:
    # sorted .01 .02 .03 .04 .50 times 5/rank: .05 .05 .05 .05 .50
    assert adjusted([0.04, 0.01, 0.5, 0.03, 0.02]) == pytest.approx([0.05, 0.05, 0.5, 0.05, 0.05])
    # .001*4/1, .30*4/2 = .60, .40*4/3 = .533 which also caps the one before, .90
    assert adjusted([0.3, 0.001, 0.9, 0.4]) == pytest.approx([0.4 * 4 / 3, 0.004, 0.9, 0.4 * 4 / 3])
    assert len(adjusted([])) == 0


@pytest.mark.parametrize(("users", "expected"), [(943, 0.041), (6_040, 0.016), (22_363, 0.008)])
def test_the_detectable_difference_of_twenty_percent_discordant_users(users: int, expected: float) -> None:
    found = detectable_difference(np.sqrt(0.2), users)
    assert round(found, 3) == expected and found == pytest.approx(2.8 * np.sqrt(0.2 / users), rel=1e-3)


def test_a_difference_of_the_detectable_size_is_found_four_times_of_five() -> None:
    rng = np.random.default_rng(9)
    size = detectable_difference(1.0, 100)
    p_values = [permutation_p(row, flips=399, seed=seed) for seed, row in enumerate(rng.normal(size, 1, (1000, 100)))]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.8, abs=0.05)


def test_bootstrap_intervals_are_those_of_the_normal_approximation_for_many_users() -> None:
    values, other = hits(2000, 0.3, 10), hits(2000, 0.25, 11)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)
    assert interval(values) == interval(values) and interval(values, seed=1) != interval(values)
    low, high = interval(values - other)  # of a paired difference
    assert low < values.mean() - other.mean() < high
    assert high - low == pytest.approx(3.92 * (values - other).std() / np.sqrt(2000), rel=0.06)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="same users .* 2 and 3"):
        compare([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="must be numbers"):
        compare([1, np.nan], [1, 0])
    with pytest.raises(ValueError, match="at least one user"):
        compare([], [])
    with pytest.raises(ValueError, match="one user"):
        interval([1.0])
    with pytest.raises(ValueError, match="users: 0"):
        detectable_difference(1, 0)
