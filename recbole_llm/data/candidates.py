"""Candidates of a user, drawn from (seed, split, user, target) and the catalogue alone.

The draw is independent of the model, batches, workers, the order of evaluation and internal ids. RecBole's samplers use the
global generator: their negatives change with the number of training epochs, repeat, and may be history items.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from recbole_llm.data import drawing
from recbole_llm.data.drawing import BLOCKS, Catalogue
from recbole_llm.store.files import fingerprint


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
    catalogue: Catalogue,
    users: Sequence[str],
    targets: np.ndarray,
    excluded: Sequence[np.ndarray],
    item_ids: Sequence[str],
    *,
    number: int,
    seed: int,
    split: str,
    new: Collection[int] = frozenset(),
    new_number: int = 0,
) -> torch.Tensor:
    """Draw ``number`` negatives for each of N targets and insert the target: LongTensor[N, number + 1].

    A row has unique ids and unique titles, and no item of ``excluded`` but the target, whose slot is uniformly random.

    Args:
        users: N user tokens.
        targets: internal item ids [N].
        excluded: N arrays of internal item ids, the history known at ``split``: training items at validation, training and
            validation items at test; nothing with repeats kept.
        item_ids: item token by internal id; entry 0 is the padding item.
        new: items of which exactly ``new_number`` are drawn.

    Raises:
        ValueError: ``number`` is below 1, or the catalogue is too small for it.
    """
    if number < 1:
        raise ValueError(f"candidates.num_negatives: {number} must be at least 1")
    seeds = _seeds(users, [item_ids[target] for target in targets.tolist()], seed, split)  # [N, 8]
    rows = np.empty((len(users), number + 1), dtype=np.int64)  # [N, C]
    left = np.arange(len(users))
    if not new_number and len(catalogue.order) > 1:
        left = _draw_at_once(catalogue, seeds, targets, excluded, new, rows)
    wanted = {True: new_number, False: number - new_number}  # negatives in and outside ``new``
    for place in left.tolist():
        target, known = int(targets[place]), frozenset(excluded[place].tolist())
        rng = np.random.default_rng(int.from_bytes(seeds[place].tobytes()))
        slot = int(rng.integers(number + 1))
        others = catalogue.draw(rng, wanted, target, known, new)
        if len(others) < number:
            raise ValueError(
                f"candidates.num_negatives: {number} is too large, user {users[place]!r} has only {len(others)} items left to "
                f"draw ({len(item_ids) - 1} items, {len(excluded[place])} of them in the history, each title at most once)"
                + (f"; {new_number} of them from {len(new)} held-out items, the others from the rest" if new else "")
            )
        if new_number:  # the scarcer kind is drawn later, so the order would reveal a target of that kind
            others = rng.permutation(others).tolist()
        rows[place] = [*others[:slot], target, *others[slot:]]
    return torch.from_numpy(rows)


def _seeds(users: Sequence[str], targets: Sequence[str], seed: int, split: str) -> np.ndarray:
    """A seed of 256 bits for each user and target, both as tokens: big-endian uint32 [N, 8]."""
    keys = (f"{seed}\t{split}\t{user}\t{target}" for user, target in zip(users, targets, strict=True))
    digests = b"".join([sha256(key.encode()).digest() for key in keys])
    return np.frombuffer(digests, dtype=">u4").reshape(-1, 8)


def _draw_at_once(
    catalogue: Catalogue,
    seeds: np.ndarray,
    targets: np.ndarray,
    excluded: Sequence[np.ndarray],
    new: Collection[int],
    rows: np.ndarray,
) -> np.ndarray:
    """Fill the rows [N, C] of all users for whom some first draws are enough; returns the places of the others."""
    number, left = rows.shape[1] - 1, np.arange(len(rows))
    for size in (number + number // 4 + 4, 2 * number, BLOCKS * 2 * number):  # most users need the first size alone
        done = np.zeros(len(left), dtype=bool)
        step = max(1, drawing.DRAWS // size)
        for start in range(0, len(left), step):
            part = slice(start, start + step)
            done[part] = catalogue.draw_many(left[part], seeds, targets, excluded, new, size, rows)
        left = left[~done]
    return left


def in_random_order(ranked: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Shuffle each of N ranked lists by ``seed``, so that prompts do not show the ranking: LongTensor[N, C]."""
    rng = np.random.default_rng(seed)
    return torch.tensor([rng.permutation(row).tolist() for row in ranked])
