"""The one sampler of negatives against the three samplers that it replaces: the same items, the same generator state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_llm.data import negatives
from recbole_llm.data.drawing import Catalogue, token_order
from recbole_llm.data.items import title_key

# -- copies of what was replaced ---------------------------------------------------------------------------------------


def old_listed(target: int, known: set[int], items: np.ndarray, number: int, rng: np.random.Generator) -> list[int]:
    others: list[int] = []
    taken = known | {target}
    left = len(items) - len(taken)
    if left < number:
        raise ValueError(
            f"candidates.num_negatives: {number} is too large for list-wise training, a history leaves {left} of the "
            f"{len(items)} items of the training split to list"
        )
    while len(others) < number:
        item = int(items[rng.integers(len(items))])
        if item not in taken:
            taken.add(item)
            others.append(item)
    others.insert(int(rng.integers(number + 1)), target)
    return others


def old_outside(trained_items: np.ndarray, history: np.ndarray, rng: np.random.Generator) -> int:
    for _ in range(100):
        item = trained_items[rng.integers(len(trained_items))]
        if item not in history:
            break
    return int(item)


class OldCatalogue(Catalogue):
    def draw(
        self, rng: np.random.Generator, wanted: Mapping[bool, int], target: int, known: frozenset[int], new: Collection[int]
    ) -> list[int]:
        chosen: list[int] = []
        taken = {self.groups[target]}
        left, number = dict(wanted), sum(wanted.values())
        for item in self._stream(rng, 2 * number):
            if left[item in new] and item not in known and self.groups[item] not in taken:
                taken.add(self.groups[item])
                chosen.append(item)
                left[item in new] -= 1
                if len(chosen) == number:
                    break
        return chosen

    def _stream(self, rng: np.random.Generator, size: int) -> Iterator[int]:
        for _ in range(8):
            if self.weights is None:
                places = rng.integers(len(self.order), size=size)
            else:
                places = np.searchsorted(self.cumulative, rng.random(size), side="right")
            yield from self.order[places].tolist()
        times = rng.exponential(size=len(self.order))
        if self.weights is not None:
            with np.errstate(divide="ignore"):
                times /= self.weights
        places = np.argsort(times, kind="stable")
        yield from self.order[places[np.isfinite(times[places])]].tolist()


# -- equality ----------------------------------------------------------------------------------------------------------


def twice(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Two generators of one state, in the middle of a 64-bit word where the seed is odd."""
    pair = np.random.default_rng(seed), np.random.default_rng(seed)
    for rng in pair:
        rng.integers(10, size=seed % 2)
    return pair


def same_state(one: np.random.Generator, other: np.random.Generator) -> bool:
    return one.bit_generator.state == other.bit_generator.state


@pytest.mark.parametrize("high", [1, 2, 1682, 2**31, 2**32 - 1, 2**32, 2**33])
def test_a_block_of_draws_is_as_many_single_draws(high: int) -> None:
    single, block = twice(3)
    sizes = [3, 1, 5, 2, 0, 9]
    assert [int(single.integers(high)) for _ in range(sum(sizes))] == [
        int(value) for size in sizes for value in block.integers(high, size=size)
    ]
    assert same_state(single, block)


@given(
    size=st.integers(2, 60),
    history=st.sets(st.integers(0, 59), min_size=1, max_size=40),
    number=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_listed(size: int, history: set[int], number: int, seed: int) -> None:
    pool = np.arange(size) * 3 + 1
    known = {item * 3 + 1 for item in history if item < size} or {1}
    target = max(known)
    before, now = twice(seed)
    if size - len(known) < number:
        with pytest.raises(ValueError) as old:
            old_listed(target, known, pool, number, before)
        with pytest.raises(ValueError) as new:
            negatives.with_target(now, target, known, pool, number)
        assert str(old.value) == str(new.value)
    else:
        for _ in range(3):  # one generator serves several examples
            assert old_listed(target, known, pool, number, before) == negatives.with_target(now, target, known, pool, number)
    assert same_state(before, now)


@given(size=st.integers(1, 40), share=st.sampled_from([0.0, 0.5, 0.97, 1.0]), seed=st.integers(0, 2**32))
def test_outside(size: int, share: float, seed: int) -> None:
    pool = np.arange(1, size + 1)
    history = np.random.default_rng(seed).permutation(pool)[: int(share * size)]
    before, now = twice(seed)
    for _ in range(3):
        assert old_outside(pool, history, before) == negatives.one(now, pool, set(history.tolist()))
    assert same_state(before, now)


@given(
    items=st.integers(3, 60),
    known=st.frozensets(st.integers(1, 60), max_size=50),
    counts=st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(sum),
    popular=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_catalogue(items: int, known: frozenset[int], counts: tuple[int, int], popular: bool, seed: int) -> None:
    ids = ["", *map(str, range(1, items + 1))]
    titles = ["", *(f"t{item % 40}" for item in range(1, items + 1))]
    weights = np.arange(items + 1.0) % 7 if popular else None  # some are 0
    wanted = {True: counts[0], False: counts[1]}
    new = frozenset(range(1, items // 3))
    before, now = twice(seed)
    parts = [*map(title_key, titles)], token_order(ids), weights
    drawn = OldCatalogue(*parts).draw(before, wanted, items, known, new)
    assert Catalogue(*parts).draw(now, wanted, items, known, new) == drawn
    assert same_state(before, now)


# -- what is new -------------------------------------------------------------------------------------------------------


def test_items_are_distinct_outside_and_equally_likely() -> None:
    rng, pool, taken = np.random.default_rng(0), np.arange(10, 40), {10, 11, 5}
    rows = [negatives.sample(rng, pool, taken, 6) for _ in range(5_000)]
    assert all(len(set(row)) == 6 for row in rows) and taken == {10, 11, 5}
    counts = np.bincount(np.concatenate(rows), minlength=40)
    assert counts[:12].sum() == 0 and chisquare(counts[12:]).pvalue > 0.001


def test_taken_items_outside_the_pool_leave_the_pool_as_large_as_it_is() -> None:
    """They were counted as if they stood in it, and a pool that is large enough was refused."""
    pool = np.arange(1, 6)
    assert sorted(negatives.sample(np.random.default_rng(0), pool, set(range(100, 200)), 5)) == [1, 2, 3, 4, 5]


def test_too_few_are_an_error_and_not_an_endless_search() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="cannot sample 3 items, 2 of 5 are left"):
        negatives.sample(rng, np.arange(5), {0, 1, 2, 99}, 3)
    with pytest.raises(ValueError, match=r"cannot sample 1 items, 0 of 0 are left"):
        negatives.sample(rng, np.empty(0, dtype=np.int64), set(), 1)
    with pytest.raises(ValueError, match=r"candidates.num_negatives: 9 .* leaves 8 of the 11 items"):
        negatives.with_target(rng, 3, {1, 2, 3}, np.arange(1, 12), 9)
    assert negatives.sample(rng, np.arange(5), {0, 1, 2}, 0) == []
