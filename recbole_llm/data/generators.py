"""The random numbers of many of numpy's generators at once, without making the generators.

``np.random.default_rng(seed)`` takes longer than all that the candidates of a user need of it. This is its algorithm over arrays:
``SeedSequence`` spreads a seed over the state of PCG64 (O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good
Algorithms for Random Number Generation", 2014), whose output becomes integers by Lemire's method ("Fast Random Integer Generation
in an Interval", ACM TOMACS 2019). Tests compare it with numpy, bit by bit.

Legend: N generators, M numbers of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER = 2549297995355413924, 4865540595714422341  # of PCG's 128 bits, the upper and the lower half


def streams(seeds: np.ndarray, number: int) -> np.ndarray:
    """The first ``number`` outputs of 64 bits of ``default_rng`` for each seed: uint64 [N, M].

    Args:
        seeds: uint32 [N, 8], numbers of 256 bits, the lowest 32 bits first. The highest must not be 0, as numpy would drop them.
    """
    high, low, step_high, step_low = _seeded(np.ascontiguousarray(seeds.T, dtype=np.uint32))
    found = np.empty((number, len(seeds)), dtype=np.uint64)  # [M, N]
    for output in found:
        high, low = _step(high, low, step_high, step_low)
        mixed, turn = high ^ low, high >> np.uint64(58)
        output[:] = (mixed >> turn) | (mixed << ((np.uint64(64) - turn) & np.uint64(63)))
    return np.ascontiguousarray(found.T)


def halves(outputs: np.ndarray) -> np.ndarray:
    """Outputs uint64 [N, M] as the 32-bit numbers that a generator makes of them, the lower half first: uint32 [N, 2 M]."""
    return outputs.astype("<u8").view("<u4")


def integers(numbers: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers uint32 [...] as integers int64 [...] below ``bound``, 2 or more; bool [...], which of them numpy draws again."""
    products = numbers.astype(np.uint64) * np.uint64(bound)
    return (products >> _32).astype(np.int64), (products & _LOW) < np.uint64(2**32 % bound)


def uniform(outputs: np.ndarray) -> np.ndarray:
    """Outputs uint64 [...] as numbers of ``Generator.random``, at least 0 and below 1: float64 [...]."""
    return (outputs >> np.uint64(11)) * 2.0**-53


def _seeded(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """The state of PCG64, of two halves, and its increment, likewise, after seeding with words uint32 [8, N]: uint64 [N] each."""
    pool = _spread([*words])
    constant, found = 0x8B51F9DD, []
    for place in range(8):
        value = pool[place % len(pool)] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(constant)
        found.append((value ^ (value >> np.uint32(16))).astype(np.uint64))
    high, low, sequence_high, sequence_low = (found[place] | (found[place + 1] << _32) for place in (0, 2, 4, 6))
    one = np.uint64(1)
    step_high, step_low = (sequence_high << one) | (sequence_low >> np.uint64(63)), (sequence_low << one) | one
    high, low = _add(step_high, step_low, high, low)  # a step from 0 is the increment
    return *_step(high, low, step_high, step_low), step_high, step_low


def _spread(words: list[np.ndarray]) -> list[np.ndarray]:
    """``SeedSequence``'s pool of four words for each seed."""
    constant = 0x43B0D7E5

    def hashed(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ (value >> np.uint32(16))

    def mixed(one: Any, two: Any) -> Any:
        value = one * np.uint32(0xCA01F9DD) - two * np.uint32(0x4973F715)
        return value ^ (value >> np.uint32(16))

    pool = [hashed(word) for word in words[:4]]
    for source in range(4):
        for other in range(4):
            if source != other:
                pool[other] = mixed(pool[other], hashed(pool[source]))
    for word in words[4:]:
        pool = [mixed(own, hashed(word)) for own in pool]
    return pool


def _step(high: np.ndarray, low: np.ndarray, step_high: np.ndarray, step_low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """State * multiplier + increment, modulo 2^128."""
    factor_high, factor_low = map(np.uint64, _MULTIPLIER)
    own = low & _LOW, low >> _32
    factor = factor_low & _LOW, factor_low >> _32
    cross = own[0] * factor[1], own[1] * factor[0]
    carry = (own[0] * factor[0] >> _32) + (cross[0] & _LOW) + (cross[1] & _LOW)
    upper = own[1] * factor[1] + (cross[0] >> _32) + (cross[1] >> _32) + (carry >> _32)
    return _add(upper + high * factor_low + low * factor_high, low * factor_low, step_high, step_low)


def _add(high: np.ndarray, low: np.ndarray, other_high: np.ndarray, other_low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = low + other_low
    return high + other_high + (total < low), total
