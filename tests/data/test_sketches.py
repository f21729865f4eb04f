"""The overlap of two multisets, estimated from a few hundred hashes of each."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.data.sketches import SIZE, common, sketch


def test_small_multisets_are_counted_exactly() -> None:
    one, other = ["a", "a", "a", "b", "c"], ["a", "a", "c", "d"]
    assert common(sketch(one), sketch(other), 5, 4) == pytest.approx(3)  # a, a and c
    assert common(sketch(one), sketch(reversed(one)), 5, 5) == pytest.approx(5)
    assert common(sketch(one), sketch([]), 5, 0) == common(sketch([]), sketch([]), 0, 0) == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 0.6, 1.0])
def test_the_share_of_a_large_one_is_estimated(share: float) -> None:
    """Within four standard errors; the share d has J = (1 - d) / (1 + d), so its error is that of J times (1 + d)^2 / 2."""
    number = 20_000
    one = [f"line {i}" for i in range(number)]
    other = [f"other {i}" if i < share * number else line for i, line in enumerate(one)]
    jaccard = (1 - share) / (1 + share)
    error = np.sqrt(jaccard * (1 - jaccard) / SIZE) * (1 + share) ** 2 / 2
    found = 1 - common(sketch(one), sketch(other), number, number) / number
    assert abs(found - share) <= 4 * error + 1e-12


def test_multisets_of_different_sizes() -> None:
    whole = [f"line {i}" for i in range(10_000)]
    assert common(sketch(whole[:5_000]), sketch(whole), 5_000, 10_000) == pytest.approx(5_000, rel=0.2)


def test_a_sketch_has_a_fixed_size_and_no_order() -> None:
    lines = [f"line {i}" for i in range(5_000)]
    assert len(sketch(lines)) == len(sketch(lines[:600])) == SIZE * 8 and sketch(lines) == sketch(reversed(lines))
    assert len(sketch(lines[:3])) == 3 * 8
