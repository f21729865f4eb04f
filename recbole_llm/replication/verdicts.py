"""From the result of a test to a verdict. The rules are stated on the page of claims; here they are in code, once.

Of the difference (better minus worse) and its 95 % interval over users:

    does not hold        the interval lies below the margin: a difference that would support the claim is excluded
    holds                the interval lies above 0, and the p-value, adjusted over the page, is below .05
    not decidable here   otherwise

Of a claim that two sides are equal: it holds if the interval lies within the margin on both sides of 0, and does not if it lies
outside. That a side is not worse holds if the interval lies above minus the margin, and does not if it lies below. A claim of
several pairs holds if it holds for all of them, and does not hold if it does not for one.

Two rows of which neither is above a random ranking decide nothing: models that have learnt nothing do not differ.

A bootstrap draws from the users that there are. If few of them differ from most others, or none, it does not know of those who
would: the interval is then wider by the share of users who may differ unseen (:func:`interval`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from recbole_llm.evaluation import significance
from recbole_llm.replication.claims import BETTER, EQUAL, NOT_WORSE

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable here"
ALPHA = 0.05
_FEW = 5  # users who differ: below, the bootstrap interval is too short


def verdict(tests: Sequence[Mapping[str, Any]], margin: float, kind: str, p_values: Sequence[float | None]) -> str:
    """The verdict of a claim.

    Args:
        tests: the measured pairs, see :mod:`recbole_llm.replication.measure`.
        p_values: of the pairs, adjusted; None where there is no test of a difference.
    """
    found = {
        OPEN if test.get("at_chance") else _RULES[kind](interval(test), margin, p)
        for test, p in zip(tests, p_values, strict=True)
    }
    return FAILS if FAILS in found else HOLDS if found == {HOLDS} else OPEN


def interval(test: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of a difference of two rows, or of a row and a number, whose values lie in [0, 1].

    If all users but four at most have the same difference, mostly 0, each end is moved outwards by 1 times the share of users who
    may have another one beyond those seen: the upper 97.5 % bound of Clopper and Pearson minus the seen share.
    """
    low, high = test["interval"]
    users, differing = test.get("users"), test.get("differing")
    if differing is None and users and test["deviation"] == test["difference"] == 0:  # a result of an earlier state
        differing = 0
    if differing is None or not users or differing >= _FEW:
        return low, high
    unseen = _largest_share(differing, users) - differing / users
    return max(low - unseen, -1.0), min(high + unseen, 1.0)  # no difference is larger


def _largest_share(differing: int, users: int) -> float:
    return float(stats.beta.ppf(0.975, differing + 1, users - differing)) if differing < users else 1.0


def adjusted(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """The p-values of a page as one Benjamini-Hochberg family."""
    return dict(zip(p_values, significance.adjusted(list(p_values.values())).tolist(), strict=True))


def users_needed(test: Mapping[str, Any], margin: float) -> int:
    """Users with whom a true difference of the margin is detected with a power of 80 %, if they vary as the measured ones."""
    if test["difference"] == test["deviation"] == 0:  # no user differs: so many that no share of the margin may
        return math.ceil(math.log(0.025) / math.log1p(-margin))
    return math.ceil(test["users"] * (significance.detectable_difference(test["deviation"], test["users"]) / margin) ** 2)


def _better(interval: Sequence[float], margin: float, p: float | None) -> str:
    low, high = interval
    if high < margin:
        return FAILS
    return HOLDS if low > 0 and (p is None or p < ALPHA) else OPEN


def _equal(interval: Sequence[float], margin: float, _: float | None) -> str:
    low, high = interval
    if low > margin or high < -margin:
        return FAILS
    return HOLDS if -margin < low and high < margin else OPEN


def _not_worse(interval: Sequence[float], margin: float, _: float | None) -> str:
    low, high = interval
    return FAILS if high < -margin else HOLDS if low > -margin else OPEN


_RULES = {BETTER: _better, EQUAL: _equal, NOT_WORSE: _not_worse}
