"""Every user's interactions in time order, and what a scenario holds out of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recbole_llm.store.files import fingerprint


@dataclass(frozen=True)
class Scenario:
    """What is held out, in internal ids; nothing by default.

    Attributes:
        label: its short name, which candidate files bear; "" where there is none.
        untrained: users on whom no model is trained or stopped.
        new: items that neither training nor validation shows.
        tested: users who may be asked at test; None for all.
        new_share: share of a test target's negatives that is drawn from ``new``; the rest is drawn from the other items.
    """

    label: str = ""
    untrained: frozenset[int] = frozenset()
    new: frozenset[int] = frozenset()
    tested: frozenset[int] | None = None
    new_share: float = 0.0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        tested = None if self.tested is None else sorted(self.tested)
        return fingerprint([self.label, sorted(self.untrained), sorted(self.new), tested, self.new_share])


@dataclass(frozen=True)
class Histories:
    """Every user's interactions in time order, after RecBole's filters and before any split or augmentation.

    Attributes:
        user_ids: token of each user by internal id; [0] is padding.
        item_ids: token of each item by internal id; [0] is padding.
        items: internal item ids of each user, by internal user id; [0] is empty.
        scenario: what is held out of training and validation; by default nothing but leave-one-out's two items a user.
    """

    user_ids: list[str]
    item_ids: list[str]
    items: list[np.ndarray]
    scenario: Scenario = Scenario()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all users, items and their order, and of what is held out."""
        digest = hashlib.sha256("\t".join([*self.user_ids, "", *self.item_ids]).encode())
        for items in self.items:
            digest.update(len(items).to_bytes(8, "little") + items.astype("<i8").tobytes())
        if self.scenario.label:
            digest.update(self.scenario.fingerprint.encode())
        return digest.hexdigest()

    def train(self, user: int) -> np.ndarray:
        """What the user did before the validation item (leave-one-out); nothing for a user held out of training."""
        return self.items[user][: 0 if user in self.scenario.untrained else -2]

    def before(self, user: int, phase: str) -> np.ndarray:
        """What precedes the user's ``valid`` or ``test`` target; the validation item belongs to the test history."""
        return self.items[user][: -2 if phase == "valid" else -1]

    def target(self, user: int, phase: str) -> int:
        """The user's held-out item of a phase."""
        return int(self.items[user][-2 if phase == "valid" else -1])

    def evaluated(self, phase: str) -> np.ndarray:
        """Users who are asked at ``valid`` or ``test``: those whom general and sequential RecBole models alike split so.

        That takes four interactions, for a train, a valid and a test row; three where only a test row is needed.
        """
        untrained, tested = self.scenario.untrained, self.scenario.tested
        found = [user for user, items in enumerate(self.items) if len(items) >= (3 if user in untrained else 4)]
        if phase == "valid":
            found = [user for user in found if user not in untrained]
        elif tested is not None:
            found = [user for user in found if user in tested]
        return np.array(found, dtype=np.int64)

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Training interactions of each item, by internal id."""
        rows = [self.train(user) for user in range(len(self.items))]
        return np.bincount(np.concatenate(rows), minlength=len(self.item_ids))
