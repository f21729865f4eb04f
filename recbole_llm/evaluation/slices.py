"""Cold and warm slices: groups of test users by the number of training interactions of their target.

With ``slices: {cold: 0.35, warm: 0.35}``, the 35 % of the catalogue with the fewest training interactions are cold, the 35 % with
the most are warm. Items with the count at the boundary belong to no slice, so a slice is never larger than its share and no item
is in both. Items without training interactions are always cold. Boundaries depend on training data alone.
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
    """Raise a ValueError if a slice is neither cold nor warm, its share is not between 0 and 1, or the shares overlap."""
    for name, share in (shares or {}).items():
        if name not in NAMES or not (isinstance(share, (int, float)) and 0 < share < 1):
            raise ValueError(f"slices: {name}: {share!r} is not cold or warm with a share between 0 and 1, as {{'cold': 0.35}}")
    if sum((shares or {}).values()) > 1:
        raise ValueError(f"slices: {shares}: the shares add up to more than 1, so items would be cold and warm; lower them")


def item_slices(counts: np.ndarray, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Which items belong to each slice, BoolArray[I] by name, from training counts [I]; item 0 is padding."""
    ranked = np.sort(counts[1:])
    places = {name: int(share * len(ranked)) for name, share in shares.items()}  # largest number of items
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
    """The ranks of the users of each slice, without slices of no or all users."""
    found = {}
    for name, users in slices.items():
        rows = [row for row in zip(ranks.users, ranks.ranks, ranks.ties, strict=True) if row[0] in users]
        if 0 < len(rows) < len(ranks.users):
            own, places, ties = map(list, zip(*rows, strict=True))
            found[name] = Ranks(own, places, ties)
    return found
