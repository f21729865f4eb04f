"""The interactions of every user in order, and what a split and a scenario hold out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from recbole_llm.store.files import fingerprint

PHASES = ("valid", "test")


@dataclass(frozen=True)
class Scenario:
    """What is held out, in internal ids; nothing by default.

    Attributes:
        label: short name, part of the names of candidate files; "" without a scenario.
        untrained: users left out of training and early stopping.
        new: items that occur neither in training nor in validation.
        tested: users who may be test users; None for all.
        new_share: share of the test negatives that is drawn from ``new``; the rest is drawn from the other items.
    """

    label: str = ""
    untrained: frozenset[int] = frozenset()
    new: frozenset[int] = frozenset()
    tested: frozenset[int] | None = None
    new_share: float = 0.0


@dataclass(frozen=True)
class Histories:
    """The interactions of every user, after RecBole's filters and before any split or augmentation.

    They are in time order; where a split does not follow from time (:mod:`recbole_llm.data.forms`), first those of training,
    then those of validation, then those of test.

    Attributes:
        user_ids: token of each user by internal id; [0] is padding.
        item_ids: token of each item by internal id; [0] is padding.
        items: internal item ids of each user, by internal user id; [0] is empty.
        scenario: what is held out besides the two items per user of leave-one-out.
        disliked: the items that each user rated low, by internal user id; None if ratings are not read.
        repeats_kept: the data has repeats, see :func:`recbole_llm.data.repeats.repeats_kept`.
        moments: a number for the time of each of ``items``, which equals that of the item before it for a tie; None if unknown.
        held_out: numbers of validation and test items at the end of each user's items [U, 2]; None: leave-one-out, one of each.
    """

    user_ids: list[str]
    item_ids: list[str]
    items: list[np.ndarray]
    scenario: Scenario = Scenario()
    disliked: list[frozenset[int]] | None = None
    repeats_kept: bool = False
    moments: list[np.ndarray] | None = None
    held_out: np.ndarray | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all users, items, their order and the scenario."""
        digest = hashlib.sha256("\t".join([*self.user_ids, "", *self.item_ids]).encode())
        for items in self.items:
            digest.update(len(items).to_bytes(8, "little") + items.astype("<i8").tobytes())
        if self.scenario.label:
            values = vars(self.scenario).items()
            digest.update(fingerprint({k: sorted(v) if isinstance(v, frozenset) else v for k, v in values}).encode())
        if self.held_out is not None:
            digest.update(self.held_out.astype("<i8").tobytes())
        for disliked in self.disliked or ():
            digest.update(repr(sorted(disliked)).encode())
        return digest.hexdigest()

    def same_split(self, other: Histories) -> bool:
        """Whether users, items, their order, what is held out and the scenario are the same; ratings are not compared."""
        one, two = (own if own.disliked is None else replace(own, disliked=None) for own in (self, other))
        return one.fingerprint == two.fingerprint

    def train(self, user: int) -> np.ndarray:
        """Items [n] of the training split, oldest first; empty for a user held out of training."""
        return self.items[user][: 0 if user in self.scenario.untrained else self._start(user, "valid")]

    def before(self, user: int, phase: str) -> np.ndarray:
        """Items [n] before the ``valid`` or ``test`` targets, oldest first; the test history includes the validation items."""
        return self.items[user][: self._start(user, phase)]

    def all_before(self, users: Iterable[int], phase: str) -> list[np.ndarray]:
        """:meth:`before` of each of N users."""
        if self.held_out is not None:
            return [self.before(user, phase) for user in users]
        items, end = self.items, self._start(0, phase)
        return [items[user][:end] for user in users]

    def excluded(self, user: int, phase: str) -> np.ndarray:
        """Items [n] that are neither candidates nor ranked beside the target: those before it, or none with repeats kept."""
        return self.before(user, phase)[: 0 if self.repeats_kept else None]

    def target(self, user: int, phase: str) -> int:
        """The held-out item of the user in a phase; of several, the first one."""
        return int(self.items[user][self._start(user, phase)])

    def targets(self, users: Iterable[int], phase: str) -> np.ndarray:
        """:meth:`target` of each of N users [N]."""
        if self.held_out is not None:
            return np.array([self.target(user, phase) for user in users], dtype=np.int64)
        items, place = self.items, self._start(0, phase)
        return np.array([items[user][place] for user in users], dtype=np.int64)

    def _start(self, user: int, phase: str) -> int:
        """The place of the first target of a phase, counted from the end if each user has one target."""
        if self.held_out is None:
            return -2 if phase == "valid" else -1
        held_out = self.held_out[user, PHASES.index(phase) :]
        return len(self.items[user]) - int(held_out.sum())

    def target_counts(self, phase: str) -> np.ndarray | None:
        """Number of targets of each user [U] in a phase; None for leave-one-out."""
        return None if self.held_out is None else self.held_out[:, PHASES.index(phase)]

    def one_target(self, phase: str) -> bool:
        """Whether no user has several targets in a phase."""
        counts = self.target_counts(phase)
        return counts is None or bool(counts.max(initial=0) <= 1)

    def evaluated(self, phase: str) -> np.ndarray:
        """Internal ids [N] of the evaluation users of a phase.

        In leave-one-out they have four interactions, the least that gives a training, a validation and a test example in
        RecBole's general and sequential models alike; users held out of training need three. In any other split they have a
        target and an item before it.
        """
        if self.held_out is not None:
            counts = self.held_out[:, PHASES.index(phase)]
            before = np.array([len(items) for items in self.items]) - self.held_out[:, PHASES.index(phase) :].sum(1)
            return np.flatnonzero((counts > 0) & (before > 0))
        untrained, tested = self.scenario.untrained, self.scenario.tested
        found = [user for user, items in enumerate(self.items) if len(items) >= (3 if user in untrained else 4)]
        if phase == "valid":
            found = [user for user in found if user not in untrained]
        elif tested is not None:
            found = [user for user in found if user in tested]
        return np.array(found, dtype=np.int64)

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Training interactions of each item, by internal id [I]."""
        items = np.concatenate([self.train(user) for user in range(len(self.items))])
        return np.bincount(items, minlength=len(self.item_ids))

    @cached_property
    def train_users(self) -> np.ndarray:
        """Users who chose each item in training, by internal id [I]; someone who chose it again counts once."""
        items = np.concatenate([np.unique(self.train(user)) for user in range(len(self.items))])
        return np.bincount(items, minlength=len(self.item_ids))


def drawn_users(users: np.ndarray, seed: int, number: int) -> np.ndarray:
    """``number`` of the users [N] in a random order, or all if there are fewer: those whom early stopping measures."""
    return users[np.random.default_rng(seed).permutation(len(users))[:number]]
