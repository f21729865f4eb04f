"""Numbers as people read them."""

from __future__ import annotations

from recbole_llm.leaderboard import digits


def test_metrics_have_three_significant_digits() -> None:
    shown = {0.51864: "0.519", 0.5: "0.500", 0.07121: "0.0712", 0.9996: "1.00", 0.0: "0.000", -0.25: "-0.250", 169.31: "169"}
    shown |= {1.0: "1.00", 0.001: "0.00100", 12345.6: "12,346", 1e-9: "0.000000"}
    assert {value: digits.significant(value) for value in shown} == shown


def test_a_half_width_is_as_exact_as_its_value() -> None:
    assert digits.with_half_width(0.51864, 0.0193) == "0.519 ±0.019"
    assert digits.with_half_width(0.07121, 0.0193) == "0.0712 ±0.0193"
    assert digits.with_half_width(0.51864, None) == "0.519" and digits.half(0.5, 0.01, "+-") == " +-0.010"


def test_numbers_as_people_read_them() -> None:
    assert [digits.duration(seconds) for seconds in (0, 4.25, 42, 119, 150, 3599, 7200, 400_000)] == [
        "0 s",
        "4.2 s",
        "42 s",
        "119 s",
        "2.5 min",
        "60 min",
        "2 h",
        "111 h",
    ]
    assert [digits.amount(value) for value in (0, 999, 1234, 1.3e6, 7e9)] == ["0", "999", "1.2 k", "1.3 M", "7 B"]
    assert digits.amount(2.13e9, "B") == "2.1 GB"
