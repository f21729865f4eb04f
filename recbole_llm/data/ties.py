"""Ties of time: the order of a user's interactions with equal times, which decides targets (``tie_order``).

==========  =====================================================================================
``file``    the order of the file
``item``    the order of the items' ids, as numbers if all of them are whole numbers
``random``  random, from ``candidates.seed`` and the ids of user and item; independent of ``seed``
==========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_llm.data.scenarios import draw_lots

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories


def tie_keys(
    config: Any, users: np.ndarray, items: np.ndarray, times: np.ndarray, user_ids: Sequence[str], item_ids: Sequence[str]
) -> np.ndarray:
    """Keys [R] that order rows of the same user and time; equal keys leave the order of the file.

    Args:
        users, items, times: internal ids and time of each row [R], in the order of the file.
        user_ids, item_ids: tokens by internal id.
    """
    rule, keys = config["tie_order"], np.zeros(len(users))
    if rule == "item":
        return _places(item_ids)[items]
    if rule == "random":
        order = np.lexsort((times, users))  # [R]
        equal = (np.diff(users[order]) == 0) & (times[order][1:] == times[order][:-1])  # [R - 1], with the next one
        tied = order[np.concatenate([equal, [False]]) | np.concatenate([[False], equal])]  # [T]
        tokens = [f"{user_ids[user]}\t{item_ids[item]}" for user, item in zip(users[tied], items[tied], strict=True)]
        keys[tied] = draw_lots(tokens, config["candidates"]["seed"], "tie_order")
    return keys


def _places(item_ids: Sequence[str]) -> np.ndarray:
    """The place [I] of each item in the order of ids; [0] is padding."""
    numeric = all(token.isdecimal() for token in item_ids[1:])
    order = sorted(range(1, len(item_ids)), key=lambda item: (int(item_ids[item]) if numeric else 0, item_ids[item]))
    places = np.zeros(len(item_ids), dtype=np.int64)
    places[order] = np.arange(1, len(item_ids))
    return places


def tied_targets(histories: Histories, phase: str) -> float | None:
    """Share of the evaluation users of a phase whose target is decided by a tie; None if the times are unknown.

    Decided by a tie: another item of the user has the same time as the target, so another order would make it the target.
    """
    if histories.moments is None:
        return None
    place, tied = -2 if phase == "valid" else -1, 0
    users = histories.evaluated(phase).tolist()
    for user in users:
        items, moments = histories.items[user], histories.moments[user]
        tied += bool((items[moments == moments[place]] != items[place]).any())
    return tied / len(users) if users else 0.0
