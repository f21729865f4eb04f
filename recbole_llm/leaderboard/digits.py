"""Numbers formatted for people."""

from __future__ import annotations

import math


def significant(value: float) -> str:
    """A metric with three significant digits: 0.519, 0.0712, 1.00, 169."""
    return f"{value:,.{decimals(value)}f}"


def decimals(value: float) -> int:
    """Decimal places that show three significant digits; three for 0, and at most six."""
    if value == 0:
        return 3
    exponent = int(f"{value:.2e}".partition("e")[2])  # after rounding, so that 0.9996 is 1.00
    return min(max(2 - exponent, 0), 6)


def with_half_width(value: float, half_width: float | None) -> str:
    """The value and the half width of its interval, with as many decimal places: 0.519 ±0.019."""
    return significant(value) + half(value, half_width)


def half(value: float, half_width: float | None, plus_minus: str = "±") -> str:
    """The half width shown after ``value``; empty without one."""
    return "" if half_width is None else f" {plus_minus}{half_width:.{decimals(value)}f}"


def p_value(p: float) -> str:
    """< .001, or three decimals."""
    return "< .001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """42 s, 12 min, 3.5 h."""
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return f"{short(seconds / size)} {unit}"


def amount(value: float, unit: str = "") -> str:
    """1.2 M, 350 k, 2.1 GB: powers of 1,000."""
    prefixes = ["", "k", "M", "G" if unit else "B", "T"]
    power = min(int(math.log10(value) / 3 + 1e-9), 4) if value >= 1 else 0
    return f"{short(value / 1000**power)} {prefixes[power]}{unit}".strip()


def short(value: float) -> str:
    """Two significant digits, or a whole number."""
    return f"{value:.2g}" if value < 9.95 else f"{value:,.0f}"
