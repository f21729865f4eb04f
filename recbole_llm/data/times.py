"""Units of times, and times that nobody can have meant: they order interactions wrongly, and so change histories and targets."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

UNITS = ((1e8, "seconds", 1), (1e11, "milliseconds", 1_000), (1e14, "microseconds", 1_000_000), (1e17, "nanoseconds", 10**9))
"""The least number that is taken for a Unix time in a unit (March 1973), the unit, and how many of them are a second."""


def unix_unit(middle: float) -> tuple[float, str, int] | None:
    """The unit of a Unix time of this size: the least number in it, its name, and how many are a second; None: no such time."""
    return max((unit for unit in UNITS if middle >= unit[0]), default=None)


def dates(times: np.ndarray) -> np.ndarray | None:
    """Those of the times [N] that are in the unit of most, in seconds since 1970; None if most are no Unix times."""
    unit = _unit(times)
    if unit is None:
        return None
    least, _, second = unit
    return times[(times >= least) & (times < 1000 * least)] / second


def odd_times(times: np.ndarray) -> list[str]:
    """What is odd about times [N], most of which are Unix times in one unit; empty if they are not, as numbers that only order.

    Times without a value are left to those who read them.
    """
    unit, usual = _unit(times), dates(times)
    if unit is None or usual is None:
        return []
    groups = [("0 or less", times <= 0), ("from 1970 to March 1973", (times > 0) & (times < UNITS[0][0]))]
    groups += [(f"in {name}", (times >= least) & (times < 1000 * least)) for least, name, _ in UNITS if name != unit[1]]
    groups += [("beyond any calendar", times >= 1000 * UNITS[-1][0])]
    first, last = (f"{datetime.fromtimestamp(float(moment), UTC):%Y-%m-%d}" for moment in (usual.min(), usual.max()))
    others, counts = f"the others are in {unit[1]}, {first} to {last}", f"of {len(times):,} times are"
    return [f"{odd.sum():,} {counts} {what}, such as {times[odd][0]:.15g}; {others}" for what, odd in groups if odd.any()]


def _unit(times: np.ndarray) -> tuple[float, str, int] | None:
    """The unit of the middle one of the positive times; None if that is no Unix time."""
    known = times[np.isfinite(times) & (times > 0)]
    middle = float(np.partition(known, len(known) // 2)[len(known) // 2]) if len(known) else 0.0
    return unix_unit(middle) if middle < 1000 * UNITS[-1][0] else None
