"""Warm and cold: the test users apart by how often training saw their target, and the metrics of each from the ranks.

``slices: {cold: 0.35, warm: 0.35}`` calls 35 % of the catalogue cold, those with the fewest training interactions, and 35 %
warm, those with the most. Where the boundary falls among items with equal counts, none of these belongs: a slice is never
larger than its share, and no item is in both. Items that were never trained are cold in any case. Boundaries come from
training data alone; the test labels only say which user is in which slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.evaluation.ranks import Ranks

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

NAMES = ("cold", "warm")


def check(shares: Mapping[str, float] | None) -> None:
    """Refuse slices that are none.

    Raises:
        ValueError: names key, value and remedy.
    """
    for name, share in (shares or {}).items():
        if name not in NAMES or not (isinstance(share, (int, float)) and 0 < share < 1):
            raise ValueError(f"slices: {name}: {share!r} is not cold or warm with a share between 0 and 1, as {{'cold': 0.35}}")


def item_slices(counts: np.ndarray, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Which items belong to each slice, BoolArray[I] by name, from training counts [I]; item 0 is padding."""
    ranked = np.sort(counts[1:])
    places = {name: int(share * len(ranked)) for name, share in shares.items()}  # how many items it may hold
    found = {}
    for name, place in places.items():
        found[name] = (counts < ranked[place]) | (counts == 0) if name == "cold" else counts > ranked[-1 - place]
        found[name][0] = False
    return found


def user_slices(histories: Histories, shares: Mapping[str, float] | None) -> dict[str, frozenset[int]]:
    """The test users of each slice by internal id."""
    users = histories.evaluated("test")
    targets = np.array([histories.target(user, "test") for user in users.tolist()], dtype=np.int64)
    found = item_slices(histories.train_counts, shares or {})
    return {name: frozenset(users[items[targets]].tolist()) for name, items in found.items()}


def parted(ranks: Ranks, slices: Mapping[str, frozenset[int]]) -> dict[str, Ranks]:
    """The ranks of each slice's users; a slice of nobody or of everybody tells nothing and is left out."""
    found = {}
    for name, users in slices.items():
        rows = [row for row in zip(ranks.users, ranks.ranks, ranks.ties, strict=True) if row[0] in users]
        if 0 < len(rows) < len(ranks.users):
            found[name] = Ranks(*map(list, zip(*rows, strict=True)))
    return found
