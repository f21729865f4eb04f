"""A shuffled domain: the same texts and numbers, without order and co-occurrence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from recbole_llm.data.domains import Domain
from recbole_llm.data.items import ItemTexts
from recbole_llm.data.shuffling import shuffled

ITEMS = 30


@pytest.fixture
def domain() -> Domain:
    """200 users who go through the catalogue in order, each from an item of their own."""
    rng = np.random.default_rng(0)
    names = ["[PAD]", *(f"title {i}" for i in range(ITEMS))]
    starts, lengths = rng.integers(ITEMS, size=200), rng.integers(2, 9, size=200)
    histories = [(start + np.arange(length)) % ITEMS + 1 for start, length in zip(starts, lengths, strict=True)]
    texts = ItemTexts(names, names, {}, {})
    return Domain("d", texts, histories, "item", "chose")


def followed(domain: Domain) -> float:
    """The share of neighbours of which one follows the other in the catalogue."""
    steps = np.concatenate([np.diff(history) % ITEMS for history in domain.histories])
    return float((steps == 1).mean())


def test_lengths_and_popularity_stay_and_order_goes(domain: Domain) -> None:
    found = shuffled(domain, 1)
    assert [len(history) for history in found.histories] == [len(history) for history in domain.histories]
    assert Counter(np.concatenate(found.histories)) == Counter(np.concatenate(domain.histories))
    assert followed(domain) == 1 and followed(found) < 0.1
    assert found.items is domain.items and found.name == domain.name and found.fingerprint != domain.fingerprint


def test_a_user_has_no_item_twice_unless_repeats_are_kept(domain: Domain) -> None:
    def repeats(found: Domain) -> int:
        return sum(len(history) > len({*history.tolist()}) for history in found.histories)

    assert repeats(shuffled(domain, 1)) == 0 < repeats(shuffled(replace(domain, repeats_kept=True), 1))


def test_the_seed_decides(domain: Domain) -> None:
    one, same, other = (shuffled(domain, seed).fingerprint for seed in (1, 1, 2))
    assert one == same != other


def test_an_item_of_every_user_stays_where_no_partner_exists(domain: Domain) -> None:
    everywhere = [np.array([1, 2]), np.array([1, 2])]
    found = shuffled(Domain("d", domain.items, everywhere, "item", "chose"), 3)
    assert Counter(np.concatenate(found.histories)) == {1: 2, 2: 2}
