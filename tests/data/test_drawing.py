"""Draws for many users at once: exactly those for one user after the other, which numpy's own generator makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.data import drawing
from tests.data.draws import draw


def case(users: int, items: int, known: int, *, titles: float = 0.75, popular: bool = False, **more: Any) -> dict[str, Any]:
    """Users with ``known`` items in their history; a share of ``titles`` is unique."""
    rng = np.random.default_rng(0)
    histories = [rng.choice(np.arange(1, items + 1), size=known + 1, replace=False) for _ in range(users)]
    weights = np.floor(100 / np.arange(1, items + 2)) if popular else None
    return {
        "users": [f"u{user}" for user in range(users)],
        "targets": [int(history[0]) for history in histories],
        "exclude": [history[1:] for history in histories],
        "titles": ["", *(f"t{item % int(items * titles)}" for item in range(items))],
        "item_ids": ["[PAD]", *(f"i{item}" for item in rng.permutation(items))],
        "number": 19,
        "seed": 2020,
        "split": "test",
        "weights": weights,
        **more,
    }


CASES = {
    "a large catalogue": case(300, 9000, 20),
    "short of items, so that all blocks and the rest are needed": case(100, 40, 5, titles=0.9),
    "popularity": case(200, 500, 10, popular=True),
    "popularity, and the popular items are known": case(100, 200, 120, popular=True, number=9),
    "held-out items are not drawn": case(100, 500, 10, new=frozenset(range(1, 200))),
    "so many held-out items are drawn": case(50, 500, 10, new=frozenset(range(1, 200)), new_number=6),
    "one negative": case(100, 300, 3, number=1),
    "no history": case(50, 300, 0),
    "many negatives": case(20, 3000, 30, number=400),
    "two items": case(10, 2, 0, titles=1, number=1),
}


def one_by_one(self: Any, places: np.ndarray, *_: Any) -> np.ndarray:
    return np.zeros(len(places), dtype=bool)


@pytest.mark.parametrize("name", CASES)
def test_draws_at_once_are_those_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = draw(**CASES[name])
    monkeypatch.setattr(drawing, "DRAWS", 500)
    assert torch.equal(draw(**CASES[name]), found)
    monkeypatch.setattr(drawing.Catalogue, "draw_many", one_by_one)
    assert torch.equal(draw(**CASES[name]), found)


def test_hardly_any_user_is_drawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be as slow as before."""
    alone = []
    own = drawing.Catalogue.draw
    monkeypatch.setattr(drawing.Catalogue, "draw", lambda self, *args: alone.append(1) or own(self, *args))
    for name in ("a large catalogue", "popularity", "held-out items are not drawn", "many negatives"):
        draw(**CASES[name])
    assert len(alone) <= 2


def test_a_generator_that_draws_again_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = draw(**CASES["a large catalogue"])
    first = drawing.Catalogue._first_draws

    def unsure(self: Any, *args: Any) -> Any:
        slots, places, sure = first(self, *args)
        places[::2] = 0
        sure[::2] = False
        return slots, places, sure

    monkeypatch.setattr(drawing.Catalogue, "_first_draws", unsure)
    assert torch.equal(draw(**CASES["a large catalogue"]), found)


@pytest.mark.parametrize("known", [0, 3, 5000])
def test_items_among_a_history(known: int) -> None:
    """Ids that share a place of the filter are told apart."""
    rng = np.random.default_rng(known)
    sets = [rng.integers(1, 20_000, size=known) for _ in range(8)]
    items = rng.integers(1, 20_000, size=(8, 500))
    items[:, :known][:, :100] = [one[:100] for one in sets] if known else items[:, :0]
    expected = np.stack([np.isin(row, one) for row, one in zip(items, sets, strict=True)])
    assert np.array_equal(drawing._among(items, sets, 20_000), expected) and expected.any() == (known > 0)
