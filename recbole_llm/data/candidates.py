"""Candidate sets: drawn once, stored as text, hashed, and shared by every model of a table.

The draw of a user depends on nothing but (seed, split, user, target) and the catalogue: neither on the model nor on
batches, workers, the order of evaluation or the internal ids that RecBole happens to give. RecBole's own samplers use
the global generator, so that its negatives change with the number of training epochs, repeat, and may be history items.

A file is a table like RecBole's atomic files, one line per user, in tokens instead of internal ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from logging import getLogger
from pathlib import Path

import numpy as np
import torch

from recbole_llm.data import negatives
from recbole_llm.data.items import title_key
from recbole_llm.store.files import atomic_write

logger = getLogger()

_HEADER = "user_id:token\titem_id:token\tcandidates:token_seq"
_BLOCKS = 8  # of random draws, before every item left is put in random order


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The candidates of N (user, target) pairs; ids are RecBole's internal ones.

    Attributes:
        users: LongTensor[N].
        targets: LongTensor[N].
        items: LongTensor[N, C], in which the target stands at a random slot.
        sha256: of the bytes of the file, in hexadecimal digits.
    """

    users: torch.Tensor
    targets: torch.Tensor
    items: torch.Tensor
    sha256: str

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
                f"{int(users[first])} with item {int(targets[first])} (internal ids); is the file of another split or "
                "data set?"
            )
        return self.items[rows[places]].to(users.device)  # [B, C]

    def covers(self, users: torch.Tensor) -> torch.Tensor:
        """BoolTensor[B]: which of ``users[B]`` have candidates."""
        return torch.isin(users, self.users.to(users.device))

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
    """Draw ``number`` negatives for each of N targets and put the target among them: LongTensor[N, number + 1].

    A row has unique ids and unique titles, and nothing of ``exclude`` but the target itself, for which each slot is
    equally likely.

    Args:
        users: N user tokens.
        targets: N internal item ids.
        exclude: N collections of internal item ids, the user's known history. Only what is known at ``split`` may stand
            in it: training items at validation, training and validation items at test.
        titles: clean title by internal item id.
        item_ids: item token by internal id; entry 0 is the padding item, which is never drawn.
        weights: chance of each item by internal id (popularity); None for equal chances.
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
                f"({len(item_ids) - 1} items, {len(known)} of them in the history, titles taken once)"
                + (f"; {new_number} of them from {len(new)} held-out items, the others from the rest" if new else "")
            )
        if new_number:  # the scarcer kind is found later: a new item at an early slot would likely be the target
            others = rng.permutation(others).tolist()
        row[:] = [*others[:slot], target, *others[slot:]]
    return torch.from_numpy(rows)


class _Catalogue:
    """The items in the order of their tokens, to draw from without repeating an item or a title."""

    def __init__(self, titles: Sequence[str], item_ids: Sequence[str], weights: np.ndarray | None) -> None:
        self.order = np.array(sorted(range(1, len(item_ids)), key=item_ids.__getitem__), dtype=np.int64)
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
        """At most ``wanted[True]`` items of ``new`` and ``wanted[False]`` others; less only if there are no more."""
        taken = {self.groups[target]}
        left, number = dict(wanted), sum(wanted.values())

        def accept(item: int) -> bool:
            if not left[item in new] or item in known or self.groups[item] in taken:
                return False
            taken.add(self.groups[item])
            left[item in new] -= 1
            return True

        blocks = self._blocks(rng, 2 * number)
        return negatives.rejection(lambda missing: next(blocks, []), accept, number)

    def _blocks(self, rng: np.random.Generator, size: int) -> Iterator[list[int]]:
        """Draws with replacement, of which the first one of an item counts, and at last every item in random order.

        That order is by exponential times over weights: a draw without replacement, proportional to the weights.
        """
        for _ in range(_BLOCKS):
            if self.weights is None:
                places = rng.integers(len(self.order), size=size)
            else:
                places = np.searchsorted(self.cumulative, rng.random(size), side="right")
            yield self.order[places].tolist()
        times = rng.exponential(size=len(self.order))
        if self.weights is not None:
            with np.errstate(divide="ignore"):
                times /= self.weights
        places = np.argsort(times, kind="stable")
        yield self.order[places[np.isfinite(times[places])]].tolist()


def candidate_path(folder: Path, *, dataset: str, split: str, source: str, number: int, seed: int, scenario: str = "") -> Path:
    """Where the candidates of a data set, scenario and split are kept."""
    return Path(folder) / ".".join(filter(None, [dataset, scenario, split, f"{source}{number}-{seed}", "candidates"]))


def load_or_draw(
    path: Path,
    users: torch.Tensor,
    targets: torch.Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    draw_items: Callable[[], torch.Tensor],
    *,
    target_required: bool = True,
) -> CandidateSet:
    """The set kept at ``path`` for ``users[N]`` and ``targets[N]``; drawn anew if it is absent, damaged or for others.

    ``draw_items`` returns LongTensor[N, C]. What is used is always what stands in the file.
    """
    if path.exists():
        try:
            found = read_candidates(path, user_ids, item_ids, target_required=target_required)
            found.lookup(users, targets)
            return found
        except ValueError as error:
            logger.warning(f"{path} is drawn anew: {error}")
    write_candidates(path, users, targets, draw_items(), user_ids, item_ids)
    return read_candidates(path, user_ids, item_ids, target_required=target_required)


def write_candidates(
    path: Path,
    users: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
) -> None:
    """Write ``users[N]``, ``targets[N]``, ``items[N, C]`` as tokens, sorted by user token: the whole file or none."""
    spaced = next((token for token in item_ids[1:] if token.split() != [token]), None)
    if spaced is not None:
        raise ValueError(f"candidates: item id {spaced!r} is empty or holds white space, which parts items in {path}")
    lines = sorted(
        (user_ids[user], item_ids[target], " ".join(item_ids[item] for item in row))
        for user, target, row in zip(users.tolist(), targets.tolist(), items.tolist(), strict=True)
    )
    atomic_write(path, "\n".join([_HEADER, *map("\t".join, lines), ""]))


def read_candidates(
    path: Path, user_ids: Sequence[str], item_ids: Sequence[str], *, target_required: bool = True
) -> CandidateSet:
    """Read a candidate file, our own or a user's, and check every line.

    ``target_required: False`` allows for candidates of a retriever, which may have missed the target.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or does not fit the data set; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"candidates: there is no file {path}")
    content = path.read_bytes()
    digest = sha256(content).hexdigest()
    user_of = {token: user for user, token in enumerate(user_ids) if user}
    item_of = {token: item for item, token in enumerate(item_ids) if item}
    lines = content.decode(errors="replace").split("\n")
    rows: dict[tuple[int, int], list[int]] = {}
    number = 1
    try:
        if lines[0].rstrip("\r") != _HEADER:
            raise ValueError(f"the header must be {_HEADER!r}")
        for number, line in enumerate(lines[1:-1], start=2):  # noqa: B007 (the error names it)
            user, target, items = _parse(line, user_of, item_of)
            _check(items, target if target_required else None, next(iter(rows.values()), items))
            if (user, target) in rows:
                raise ValueError("the same user and target stand in an earlier line")
            rows[user, target] = items
        if lines[-1] or not rows:
            raise ValueError("the end is missing, the last line must end in a line break")
    except ValueError as error:
        raise ValueError(
            f"candidates: {path}, line {number}: {error}; mend the file, or delete it to have it drawn anew"
        ) from None
    pairs = torch.tensor(list(rows))  # [N, 2]
    return CandidateSet(pairs[:, 0], pairs[:, 1], torch.tensor(list(rows.values())), digest)


def _parse(line: str, user_of: Mapping[str, int], item_of: Mapping[str, int]) -> tuple[int, int, list[int]]:
    cells = line.rstrip("\r").split("\t")
    if len(cells) != 3:
        raise ValueError(f"{len(cells)} cells instead of 3 (user, target, candidates)")
    user, target, candidates = cells
    if user not in user_of:
        raise ValueError(f"user {user!r} is not in the data set")
    tokens = candidates.split(" ")
    unknown = [token for token in (target, *tokens) if token not in item_of]
    if unknown:
        raise ValueError(f"items {unknown[:5]} are not in the data set")
    return user_of[user], item_of[target], [item_of[token] for token in tokens]


def _check(items: Sequence[int], target: int | None, first: Sequence[int]) -> None:
    if len(items) != len(first):
        raise ValueError(f"{len(items)} candidates, but {len(first)} in line 2")
    if len(set(items)) != len(items):
        raise ValueError("a candidate stands there twice")
    if target is not None and target not in items:
        raise ValueError("the target is not among the candidates")
