"""Negative items by rejection: draw at random, leave out what is taken; the only such sampler of this package.

Candidate sets, list-wise training prompts and pairwise losses all sample through :func:`rejection`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

TRIES = 100
"""Draws of :func:`one` before it accepts an item that is taken."""


def rejection(draw: Callable[[int], Sequence[int]], accept: Callable[[int], bool], number: int) -> list[int]:
    """The first ``number`` drawn items that are accepted; fewer if the draws end before.

    Args:
        draw: gets the number of items still missing and returns the next draws; an empty sequence ends the search.
        accept: called once for each draw, in order. It has to remember what it accepted if items must be distinct.
    """
    found: list[int] = []
    while len(found) < number and len(drawn := draw(number - len(found))):
        for item in drawn:
            if accept(item):
                found.append(item)
                if len(found) == number:
                    break
    return found


def sample(rng: np.random.Generator, pool: np.ndarray, taken: set[int], number: int) -> list[int]:
    """``number`` distinct items of ``pool`` outside ``taken``, each equally likely.

    A block of draws is never larger than the number of items still missing. So the generator ends in the state in which
    drawing one item at a time would leave it, and the items are the same.

    Args:
        pool: item ids, each of them once.
        taken: may hold items that are not in the pool; it is not changed.

    Raises:
        ValueError: fewer than ``number`` items are left.
    """
    if len(pool) - len(taken) < number and (left := _left(pool, taken)) < number:
        raise ValueError(f"{number} items were asked for, {left} of {len(pool)} are left")
    seen = set(taken)

    def accept(item: int) -> bool:
        new = item not in seen
        seen.add(item)
        return new

    return rejection(lambda missing: pool[rng.integers(len(pool), size=missing)].tolist(), accept, number)


def with_target(rng: np.random.Generator, target: int, taken: set[int], pool: np.ndarray, number: int) -> list[int]:
    """The target at a random place among ``number`` items of :func:`sample`; the target counts as taken.

    Raises:
        ValueError: fewer than ``number`` items are left.
    """
    taken = taken | {target}
    try:
        listed = sample(rng, pool, taken, number)
    except ValueError as error:
        raise ValueError(
            f"candidates.num_negatives: {number} is too large for list-wise training, a history leaves {_left(pool, taken)} "
            f"of the {len(pool)} items of the training split to list"
        ) from error
    listed.insert(int(rng.integers(number + 1)), target)
    return listed


def one(rng: np.random.Generator, pool: np.ndarray, taken: set[int]) -> int:
    """One item of ``pool`` outside ``taken``, each equally likely; the last of :data:`TRIES` draws if all of them are taken.

    It suits a loss that needs a negative item for every user, even for one whose history holds the whole pool.
    """
    drawn: list[int] = []

    def draw(missing: int) -> list[int]:
        if len(drawn) == TRIES:
            return []
        drawn.append(int(pool[rng.integers(len(pool))]))
        return drawn[-1:]

    found = rejection(draw, lambda item: item not in taken, 1)
    return (found or drawn)[-1]


def _left(pool: np.ndarray, taken: set[int]) -> int:
    return len(np.setdiff1d(pool, np.fromiter(taken, dtype=np.int64, count=len(taken))))
