"""Paired tests, intervals and power for two models on the same users.

The null hypothesis of the paired permutation test is that the two models are exchangeable for each user: every sign of a per-user
difference has probability 1/2. The two-sided p-value is the share of sign patterns whose sum is at least as far from zero as the
observed one. It is exact if few users differ or if the differences are on a lattice (a hit, also averaged over seeds), and
otherwise sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray

_ENUMERATED = 12  # users who differ: at most 2^12 sign patterns are enumerated
_UNITS = 60  # differences that are multiples of 1/1 .. 1/60 are on a lattice
_LATTICE_WORK = 20_000_000  # points times magnitudes
_CHUNK = 4_000_000  # flips times users in memory


@dataclass(frozen=True)
class Comparison:
    """Two models on the same users.

    Attributes:
        users: number of users.
        difference: mean of the first minus mean of the second.
        p_value: two-sided; 1.0 exactly where no user differs.
        deviation: standard deviation of the per-user differences.
    """

    users: int
    difference: float
    p_value: float
    deviation: float

    @property
    def higher(self) -> str | None:
        """Which mean is higher: ``first``, ``second``, or None if they are equal."""
        return "first" if self.difference > 0 else "second" if self.difference < 0 else None


def compare(first: Values, second: Values, *, flips: int = 10_000, seed: int = 2020) -> Comparison:
    """Paired two-sided permutation test of per-user values [N] and [N], user by user in the same order.

    Symmetric in its arguments and independent of the order of users.

    Raises:
        ValueError: not the same users, none, or values that are not numbers.
    """
    differences = _paired(first, second)
    mean = math.fsum(differences) / len(differences)
    return Comparison(
        users=len(differences),
        difference=mean,
        p_value=permutation_p(differences, flips=flips, seed=seed),
        deviation=float(np.sqrt(np.mean((differences - mean) ** 2))),
    )


def permutation_p(differences: Values, *, flips: int = 10_000, seed: int = 2020) -> float:
    """Two-sided p-value of per-user differences [N] under random signs; a sampled one includes the observed pattern."""
    given = np.asarray(differences, dtype=np.float64)
    magnitudes = np.sort(np.abs(given[given != 0]))  # [D], independent of the order of users and arguments
    observed = abs(math.fsum(given))
    if len(magnitudes) < 2:  # either sign of a single difference is as far from zero
        return 1.0
    steps, unit = _on_lattice(magnitudes)
    if unit:
        return _lattice_p(steps, round(observed * unit))
    if len(magnitudes) <= _ENUMERATED:
        return _enumerated_p(magnitudes, observed)
    return _sampled_p(magnitudes, observed, flips, seed)


def _on_lattice(magnitudes: np.ndarray) -> tuple[np.ndarray, int]:
    """Magnitudes [D] as integer multiples [D] of 1 / unit; unit 0 if there is none or the lattice is too large."""
    distinct = np.unique(magnitudes)
    for unit in range(1, _UNITS + 1):
        steps = np.rint(distinct * unit)
        if np.all(steps > 0) and np.allclose(distinct * unit, steps, rtol=0, atol=1e-9 * unit):
            whole = np.rint(magnitudes * unit).astype(np.int64)
            return whole, unit if 2 * int(whole.sum()) * len(np.unique(whole)) <= _LATTICE_WORK else 0
    return distinct, 0


def _lattice_p(steps: np.ndarray, observed: int) -> float:
    """Exact share of sign patterns of integer ``steps`` [D] whose sum is at least ``observed`` away from 0, to about 1e-12.

    The sum's characteristic function is a product of cosines; its inverse Fourier transform is the distribution.
    """
    total = int(steps.sum())
    points = 2 * total + 1  # sums from -total to total
    angles = 2 * np.pi * np.arange(total + 1) / points  # half of the spectrum: it is real and even
    spectrum = np.ones(total + 1)
    for step, count in zip(*np.unique(steps, return_counts=True), strict=True):
        spectrum *= np.cos(step * angles) ** count
    chance = np.clip(np.fft.irfft(spectrum, n=points), 0, None)  # [points]; index s holds sum s, index -s holds sum -s
    p = 1.0 if observed == 0 else 2 * chance[observed : total + 1].sum()
    return float(np.clip(p, np.finfo(np.float64).tiny, 1.0))


def _enumerated_p(magnitudes: np.ndarray, observed: float) -> float:
    """All sign patterns of a few magnitudes [D]; sums that equal the observed one up to rounding count."""
    signs = np.array(list(product((-1, 1), repeat=len(magnitudes))))  # [2^D, D]
    return float(np.mean(np.abs(signs @ magnitudes) >= observed - 1e-9 * magnitudes.sum()))


def _sampled_p(magnitudes: np.ndarray, observed: float, flips: int, seed: int) -> float:
    """Random sign patterns of magnitudes [D], in chunks; sums that equal the observed one up to rounding count."""
    rng = np.random.default_rng(seed)
    total = magnitudes.sum()
    bar = observed - 1e-9 * total
    extreme, rows = 0, max(1, _CHUNK // len(magnitudes))
    for start in range(0, flips, rows):
        heads = rng.integers(0, 2, size=(min(rows, flips - start), len(magnitudes)), dtype=np.int8)
        extreme += int((np.abs(2 * (heads @ magnitudes) - total) >= bar).sum())
    return (extreme + 1) / (flips + 1)


def interval(values: Values, *, level: float = 0.95, resamples: int = 2_000, seed: int = 2020) -> tuple[float, float]:
    """Bootstrap interval (percentiles, users drawn with replacement) of the mean of per-user values [N].

    Raises:
        ValueError: fewer than two users, or values that are not numbers.
    """
    given = _checked(values)
    if len(given) < 2:
        raise ValueError("a bootstrap interval needs more than one user")
    found = stats.bootstrap(
        (given,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, _CHUNK // len(given)),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def adjusted(p_values: Values) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values [M] of a family of p-values [M]; control the false discovery rate."""
    given = np.asarray(p_values, dtype=np.float64)
    return stats.false_discovery_control(given, method="bh") if len(given) else given


def detectable_difference(deviation: float, users: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true mean difference that a two-sided paired test of ``users`` detects with probability ``power``.

    ``deviation`` is the standard deviation of the per-user differences (normal approximation, one test). For a binary metric
    with a share d of discordant users it is about sqrt(d), hence 2.8 * sqrt(d / n) at alpha .05 and power .8.

    Raises:
        ValueError: no users.
    """
    if users < 1:
        raise ValueError(f"users: {users} must be at least 1")
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * deviation / math.sqrt(users))


def _checked(values: Values) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise ValueError(f"per-user values must be numbers, one for each of at least one user; got {given.shape} {given[:5]}")
    return given


def _paired(first: Values, second: Values) -> np.ndarray:
    one, other = _checked(first), _checked(second)
    if len(one) != len(other):
        raise ValueError(f"a paired test needs the same users in the same order; got {len(one)} and {len(other)} values")
    differences = one - other
    differences[np.abs(differences) < 1e-12] = 0.0  # rounding of averages over seeds
    return differences
