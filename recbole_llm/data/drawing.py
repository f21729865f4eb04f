"""Draws items of a catalogue, none of a history and no title twice: for one user by numpy's generator, for many users at once.

Both ways give the same items; the second one needs a tenth of the time.

Legend: M of N users, S draws of each, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice

import numpy as np

from recbole_llm.data.generators import halves, integers, streams, uniform

BLOCKS = 8  # blocks of random draws before the rest of the catalogue is shuffled
DRAWS = 2**16  # of many users at once
_FILTER = 2**10


class Catalogue:
    """Samples items without repeating an item or a title, independently of internal ids.

    Args:
        keys: :func:`~recbole_llm.data.items.title_key` of each item by internal id [I].
        order: :func:`token_order`.
        weights: of each item by internal id [I]; None for a uniform draw.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """

    def __init__(self, keys: Sequence[str], order: Sequence[int], weights: np.ndarray | None) -> None:
        self.order = np.array(order, dtype=np.int64)
        groups: dict[str, int] = {}
        self.groups = [groups.setdefault(key or f"\t{item}", item) for item, key in enumerate(keys)]
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)[self.order]
        if self.weights is not None:
            if not (np.isfinite(self.weights).all() and self.weights.min() >= 0 < self.weights.sum()):
                raise ValueError("candidates.source: weights must be finite, none below 0, and one above 0")
            cumulative = np.cumsum(self.weights)
            self.cumulative = cumulative / cumulative[-1]  # ends in 1 exactly, so a weight of 0 is never drawn

    def draw(
        self, rng: np.random.Generator, wanted: Mapping[bool, int], target: int, known: frozenset[int], new: Collection[int]
    ) -> list[int]:
        """Draw ``wanted[True]`` items of ``new`` and ``wanted[False]`` others; fewer only if no more are left."""
        taken = {self.groups[target]}
        left, number = dict(wanted), sum(wanted.values())

        def accept(item: int) -> bool:
            if not left[item in new] or item in known or self.groups[item] in taken:
                return False
            taken.add(self.groups[item])
            left[item in new] -= 1
            return True

        return list(islice(filter(accept, self._draws(rng, 2 * number)), number))

    def draw_many(
        self,
        places: np.ndarray,
        seeds: np.ndarray,
        targets: np.ndarray,
        excluded: Sequence[np.ndarray],
        new: Collection[int],
        size: int,
        rows: np.ndarray,
    ) -> np.ndarray:
        """What :meth:`draw` gives M users at once, if their first ``size`` draws are enough; returns for whom they are [M].

        Args:
            places: of the users [M] among all N.
            seeds: SHA-256 of all N users, big-endian uint32 [N, 8].
            targets, excluded: target and history of all N users.
            new: items that are not drawn.
            rows: candidates of all N users [N, C], in which those of the finished ones are written.
        """
        number = rows.shape[1] - 1
        slots, drawn, sure = self._first_draws(seeds[places, ::-1], number + 1, size)  # [M], [M, S], [M]
        items, own = self.order[drawn], targets[places]  # [M, S], [M]
        groups = self._groups[items]  # [M, S]
        good = ~_among(items, [excluded[place] for place in places.tolist()], len(self.groups)) & (
            groups != self._groups[own, None]
        )
        if new:
            good &= ~np.isin(items, list(new))
        good &= ~_repeated(np.where(good, groups, -1 - np.arange(size)))
        done = sure & (good.sum(1) >= number)  # [M]
        good &= (good.cumsum(1) <= number) & done[:, None]
        others = items[good].reshape(-1, number)  # [m, C - 1], m of the M users
        slots, columns = slots[done, None], np.arange(number)  # [m, 1], [C - 1]
        found = np.empty((len(others), number + 1), dtype=np.int64)  # [m, C]
        np.put_along_axis(found, columns + (columns >= slots), others, axis=1)
        np.put_along_axis(found, slots, own[done, None], axis=1)
        rows[places[done]] = found
        return done

    @cached_property
    def _groups(self) -> np.ndarray:
        return np.array(self.groups, dtype=np.int64)  # [I]

    def _first_draws(self, seeds: np.ndarray, slots: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The slot [M] and the first places drawn [M, S], as of :meth:`_draws`, of M seeds, and which of them are certain [M]."""
        if self.weights is not None:
            outputs = streams(seeds, 1 + size)
            slot, again = integers(halves(outputs[:, :1])[:, 0], slots)
            places = np.searchsorted(self.cumulative, uniform(outputs[:, 1:]), side="right")
        else:
            numbers = halves(streams(seeds, size // 2 + 1))
            slot, again = integers(numbers[:, 0], slots)
            places, others = integers(numbers[:, 1 : size + 1], len(self.order))
            again |= others.any(1)
        return slot, places, ~again & (seeds[:, -1] > 0)

    def _draws(self, rng: np.random.Generator, size: int) -> Iterator[int]:
        """Draws with replacement in blocks of ``size``, then all items in random order.

        That order sorts exponential variates divided by the weights: weighted sampling without replacement.
        """
        for _ in range(BLOCKS):
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


def _among(items: np.ndarray, sets: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Which of the items [M, S] are in the set of their row; ids are below ``number``."""
    known = np.concatenate([*sets, np.empty(0, dtype=np.int64)])
    owners = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    seen = np.zeros(_FILTER * len(sets), dtype=bool)  # a few ids share a place, so it only says which items are not in the set
    seen[_FILTER * owners + known % _FILTER] = True
    found = seen.take(_FILTER * np.arange(len(items))[:, None] + items % _FILTER)  # [M, S]
    rows, columns = np.nonzero(found)
    pairs, wanted = np.sort(known + number * owners), items[rows, columns] + number * rows
    if len(wanted):
        found[rows, columns] = pairs[np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)] == wanted
    return found


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which values [M, S] are in an earlier column of their row, too."""
    found = np.zeros(values.shape, dtype=bool)
    ranked = np.sort(values, axis=1)
    rows = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(1))  # few, mostly
    order = np.argsort(values[rows], axis=1, kind="stable")
    ranked = np.take_along_axis(values[rows], order, axis=1)
    found[rows[:, None], order[:, 1:]] = ranked[:, 1:] == ranked[:, :-1]
    return found


def token_order(item_ids: Sequence[str]) -> list[int]:
    """Internal item ids in the order of their tokens, without padding."""
    return sorted(range(1, len(item_ids)), key=item_ids.__getitem__)
