"""Negative items of training by rejection sampling, for list-wise prompts and pairwise losses."""

from __future__ import annotations

import numpy as np

TRIES = 100  # draws of `one` before it accepts an item that is taken


def sample(rng: np.random.Generator, pool: np.ndarray, taken: set[int], number: int) -> list[int]:
    """Sample ``number`` distinct items of ``pool`` outside ``taken`` uniformly.

    A block has as many draws as items are missing, so items and generator state equal those of single draws.

    Args:
        pool: distinct item ids.
        taken: may contain items that are not in the pool; it is not changed.

    Raises:
        ValueError: fewer than ``number`` items are left.
    """
    if len(pool) - len(taken) < number and (left := _left(pool, taken)) < number:
        raise ValueError(f"cannot sample {number} items, {left} of {len(pool)} are left")
    found: list[int] = []
    seen = set(taken)
    while len(found) < number:
        for item in pool[rng.integers(len(pool), size=number - len(found))].tolist():
            if item not in seen:
                seen.add(item)
                found.append(item)
    return found


def with_target(rng: np.random.Generator, target: int, taken: set[int], pool: np.ndarray, number: int) -> list[int]:
    """``number`` items of :func:`sample` with the target inserted at a random place; the target counts as taken.

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
    """Sample one item of ``pool`` outside ``taken`` uniformly; the last of :data:`TRIES` draws if all of them are taken.

    So a loss gets a negative item for every user, even if a history contains the whole pool.
    """
    for _ in range(TRIES):
        item = int(pool[rng.integers(len(pool))])
        if item not in taken:
            break
    return item


def _left(pool: np.ndarray, taken: set[int]) -> int:
    return len(np.setdiff1d(pool, np.fromiter(taken, dtype=np.int64, count=len(taken))))
