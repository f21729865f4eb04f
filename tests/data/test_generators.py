"""Generators over arrays: every number is that of numpy's own generator with the same seed."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from recbole_llm.data.generators import halves, integers, streams, uniform

KEYS = [sha256(f"user {number}".encode()).digest() for number in range(2000)]
SEEDS = np.frombuffer(b"".join(KEYS), dtype=">u4").reshape(-1, 8)[:, ::-1]


def numpys() -> list[np.random.Generator]:
    return [np.random.default_rng(int.from_bytes(key)) for key in KEYS]


def test_outputs_and_numbers_between_0_and_1_are_numpys() -> None:
    outputs = streams(SEEDS, 9)
    assert outputs.dtype == np.uint64 and outputs.shape == (2000, 9)
    assert np.array_equal(outputs, [rng.bit_generator.random_raw(9) for rng in numpys()])
    assert np.array_equal(uniform(outputs), [rng.random(9) for rng in numpys()])


def test_seeds_of_few_and_of_many_bits() -> None:
    words = np.zeros((4, 8), dtype=np.uint32)
    words[:, -1] = 1, 2**31, 2**32 - 1, 7
    words[1] = 2**32 - 1
    seeds = [sum(int(word) << 32 * place for place, word in enumerate(row)) for row in words]
    assert np.array_equal(streams(words, 3), [np.random.default_rng(seed).bit_generator.random_raw(3) for seed in seeds])


@pytest.mark.parametrize("bound", [2, 3, 1682, 20_000, 2**20 + 7, 2**24, 2**31 - 1])
def test_integers_are_numpys_unless_it_draws_again(bound: int) -> None:
    """One integer below 20, then a block of seven and one of four, as a draw of candidates asks for them."""
    numbers = halves(streams(SEEDS, 6))
    slots, first = integers(numbers[:, 0], 20)
    found, again = integers(numbers[:, 1:], bound)
    sure = ~first & ~again.any(1)
    assert sure.mean() > (0.99 if bound < 2**20 else 0.4)
    for place, rng in enumerate(numpys()):
        expected = [int(rng.integers(20)), *rng.integers(bound, size=7), *rng.integers(bound, size=4)]
        if sure[place]:
            assert [slots[place], *found[place]] == expected


def test_where_numpy_draws_again_it_is_said() -> None:
    """2^31 - 1 leaves 2 of 2^32 numbers over, 2^31 + 1 almost half of them."""
    numbers = halves(streams(SEEDS, 1))[:, 0]
    found, again = integers(numbers, 2**31 + 1)
    expected = np.array([int(rng.integers(2**31 + 1)) for rng in numpys()])
    assert 0.4 < again.mean() < 0.6
    assert np.array_equal(found[~again], expected[~again]) and (found[again] != expected[again]).mean() > 0.9
