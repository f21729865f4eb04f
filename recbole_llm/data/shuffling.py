"""A domain without its order and co-occurrence: the placebo of a domain on which an adapter is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from recbole_llm.data.domains import Domain

TRIES = 1000  # random partners of an item that a user would have twice


def shuffled(domain: Domain, seed: int) -> Domain:
    """The domain with all item occurrences permuted at random among its histories.

    Texts, lengths of histories and the number of occurrences of each item stay; which items occur together, and in which
    order, is random. Unless repeats are kept, an item that a history would have twice changes places with a random one.
    """
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.concatenate([np.empty(0, dtype=np.int64), *domain.histories]))  # [N occurrences]
    lengths = [len(history) for history in domain.histories]
    if not domain.repeats_kept:
        _separate(items, np.repeat(np.arange(len(lengths)), lengths), rng)
    return replace(domain, histories=np.split(items, np.cumsum(lengths)[:-1]) if lengths else [])


def _separate(items: np.ndarray, users: np.ndarray, rng: np.random.Generator) -> None:
    """Exchange occurrences [N] until no user has an item twice, as far as random partners are found."""
    counts = Counter(zip(users.tolist(), items.tolist(), strict=True))
    for place in range(len(items)):
        user, item = int(users[place]), int(items[place])
        if counts[user, item] == 1:
            continue
        for other in rng.integers(len(items), size=TRIES).tolist():
            partner, theirs = int(users[other]), int(items[other])
            if partner != user and not counts[user, theirs] and not counts[partner, item]:
                items[place], items[other] = theirs, item
                counts[user, item] -= 1
                counts[partner, theirs] -= 1
                counts[user, theirs] = counts[partner, item] = 1
                break
