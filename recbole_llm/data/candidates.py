"""Candidates of a user, drawn from (seed, split, user, target) and the catalogue alone.

The draw is independent of the model, batches, workers, the order of evaluation and internal ids. RecBole's samplers use the
global generator: their negatives change with the number of training epochs, repeat, and may be history items.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import islice

import numpy as np
import torch

from recbole_llm.data.items import title_key
from recbole_llm.store.files import fingerprint

_BLOCKS = 8  # blocks of random draws before the rest of the catalogue is shuffled


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The candidates of N (user, target) pairs; ids are RecBole's internal ones.

    Attributes:
        users: LongTensor[N].
        targets: LongTensor[N].
        identity: what a stage may depend on. It is known before the candidates are, which may need a trained retriever.
        resolve: returns ``items`` and ``sha256``; called once, on first use.
    """

    users: torch.Tensor
    targets: torch.Tensor
    identity: str
    resolve: Callable[[], tuple[torch.Tensor, str]] = field(repr=False)

    @classmethod
    def of(cls, users: torch.Tensor, targets: torch.Tensor, items: torch.Tensor, digest: str) -> CandidateSet:
        """A set with known items [N, C]; its identity is the SHA-256 of their file."""
        return cls(users, targets, digest, lambda: (items, digest))

    @property
    def items(self) -> torch.Tensor:
        """LongTensor[N, C], with the target at a random slot."""
        return self._resolved[0]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file, for a :meth:`subset` of the whole file."""
        return self._resolved[1]

    @cached_property
    def _resolved(self) -> tuple[torch.Tensor, str]:
        return self.resolve()

    def subset(self, rows: torch.Tensor) -> CandidateSet:
        """The pairs at ``rows`` [M], with a new identity."""
        identity = fingerprint([self.identity, rows.tolist()])
        return CandidateSet(self.users[rows], self.targets[rows], identity, lambda: (self.items[rows], self.sha256))

    def lookup(self, users: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Candidates of the pairs ``users[B]``, ``targets[B]``: LongTensor[B, C] on their device.

        Raises:
            ValueError: a pair has no candidates.
        """
        keys, rows = self._index
        wanted = _pair_keys(users, targets)  # [B]
        places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)  # [B]
        missing = (keys[places] != wanted).nonzero().flatten()  # [M]
        if len(missing):
            first = int(missing[0])
            raise ValueError(
                f"candidates: {len(missing)} of {len(wanted)} users have none for their target, the first is user "
                f"{users[first]} with item {targets[first]} (internal ids); is the file of another split or dataset?"
            )
        return self.items[rows[places]].to(users.device)  # [B, C]

    def covers(self, users: torch.Tensor) -> torch.Tensor:
        """BoolTensor[B]: which of ``users[B]`` have candidates."""
        known = self._users
        places = torch.searchsorted(known, users.long().cpu()).clamp(max=len(known) - 1)  # [B]
        return (known[places] == users.cpu()).to(users.device)

    @cached_property
    def _users(self) -> torch.Tensor:
        return torch.unique(self.users.long().cpu())

    @cached_property
    def _index(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sort(_pair_keys(self.users, self.targets))


def _pair_keys(users: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (users.long().cpu() << 32) + targets.long().cpu()  # [B]


def draw(
    users: Sequence[str],
    targets: Sequence[int],
    exclude: Sequence[Collection[int]],
    titles: Sequence[str],
    item_ids: Sequence[str],
    *,
    number: int,
    seed: int,
    split: str,
    weights: np.ndarray | None = None,
    new: Collection[int] = frozenset(),
    new_number: int = 0,
) -> torch.Tensor:
    """Draw ``number`` negatives for each of N targets and insert the target: LongTensor[N, number + 1].

    A row has unique ids and unique titles, and no item of ``exclude`` but the target, whose slot is uniformly random.

    Args:
        users: N user tokens.
        targets: N internal item ids.
        exclude: N collections of internal item ids, the history known at ``split``: training items at validation, training
            and validation items at test; nothing with repeats kept.
        titles: clean title by internal item id.
        item_ids: item token by internal id; entry 0 is the padding item, which is never drawn.
        weights: weight of each item by internal id (popularity); None for a uniform draw.
        new: items of which exactly ``new_number`` are drawn.

    Raises:
        ValueError: the catalogue is too small.
    """
    if number < 1:
        raise ValueError(f"candidates.num_negatives: {number} must be at least 1")
    catalogue = _Catalogue(titles, item_ids, weights)
    wanted = {True: new_number, False: number - new_number}  # negatives in and outside ``new``
    rows = np.empty((len(users), number + 1), dtype=np.int64)  # [N, C]
    for row, user, target, known in zip(rows, users, targets, exclude, strict=True):
        key = "\t".join((str(seed), split, user, item_ids[target]))
        rng = np.random.default_rng(int.from_bytes(sha256(key.encode()).digest()))
        slot = int(rng.integers(number + 1))
        others = catalogue.draw(rng, wanted, int(target), frozenset(map(int, known)), new)
        if len(others) < number:
            raise ValueError(
                f"candidates.num_negatives: {number} is too large, user {user!r} has only {len(others)} items left to draw "
                f"({len(item_ids) - 1} items, {len(known)} of them in the history, each title at most once)"
                + (f"; {new_number} of them from {len(new)} held-out items, the others from the rest" if new else "")
            )
        if new_number:  # the scarcer kind is drawn later, so the order would reveal a target of that kind
            others = rng.permutation(others).tolist()
        row[:] = [*others[:slot], target, *others[slot:]]
    return torch.from_numpy(rows)


class _Catalogue:
    """Samples items without repeating an item or a title, independently of internal ids."""

    def __init__(self, titles: Sequence[str], item_ids: Sequence[str], weights: np.ndarray | None) -> None:
        self.order = np.array(token_order(item_ids), dtype=np.int64)
        groups: dict[str, int] = {}
        self.groups = [groups.setdefault(title_key(title) or f"\t{item}", item) for item, title in enumerate(titles)]
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

    def _draws(self, rng: np.random.Generator, size: int) -> Iterator[int]:
        """Draws with replacement in blocks of ``size``, then all items in random order.

        That order sorts exponential variates divided by the weights: weighted sampling without replacement.
        """
        for _ in range(_BLOCKS):
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


def token_order(item_ids: Sequence[str]) -> list[int]:
    """Internal item ids in the order of their tokens, without padding."""
    return sorted(range(1, len(item_ids)), key=item_ids.__getitem__)


def in_random_order(ranked: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Shuffle each of N ranked lists by ``seed``, so that prompts do not show the ranking: LongTensor[N, C]."""
    rng = np.random.default_rng(seed)
    return torch.tensor([rng.permutation(row).tolist() for row in ranked])
