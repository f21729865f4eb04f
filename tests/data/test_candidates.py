from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from recbole_llm.data.candidates import CandidateSet, in_random_order
from tests.data.draws import draw

ITEMS = 60
IDS = ["[PAD]", *(f"i{item}" for item in range(1, ITEMS + 1))]
TITLES = ["", *(f"Title {item % 50}" for item in range(1, ITEMS + 1))]  # ten titles twice
USER_IDS = ["[PAD]", *(f"u{user}" for user in range(1, 41))]


def toy(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    histories = [rng.choice(np.arange(1, ITEMS + 1), size=15, replace=False) for _ in USER_IDS[1:]]
    arguments = {
        "users": USER_IDS[1:],
        "targets": [int(history[0]) for history in histories],
        "exclude": [set(history[1:].tolist()) for history in histories],
        "titles": TITLES,
        "item_ids": IDS,
        "number": 19,
        "seed": 2020,
        "split": "test",
    }
    return arguments | changes


def as_tokens(rows: torch.Tensor, ids: list[str]) -> list[list[str]]:
    return [[ids[item] for item in row] for row in rows.tolist()]


@pytest.mark.parametrize("weights", [None, np.arange(ITEMS + 1.0)])
def test_rows_are_sound(weights: np.ndarray | None) -> None:
    arguments = toy(weights=weights)
    rows = draw(**arguments)
    assert rows.shape == (40, 20) and rows.dtype == torch.int64
    for row, target, known in zip(rows.tolist(), arguments["targets"], arguments["exclude"], strict=True):
        assert row.count(target) == 1
        assert len(set(row)) == len({TITLES[item] for item in row}) == 20
        assert known.isdisjoint(row) and 0 not in row


def test_titles_count_as_equal_whatever_their_case_and_spacing() -> None:
    rows = draw(
        ["u"] * 50,
        [1] * 50,
        [()] * 50,
        ["", "Soap", "soap", " SOAP  ", "a  B", "A b"],
        ["[PAD]", *"vwxyz"],
        number=1,
        seed=0,
        split="test",
    )
    assert set(rows.flatten().tolist()) <= {1, 4, 5}
    with pytest.raises(ValueError, match=r"candidates\.num_negatives: 2 is too large, user 'u' has only 1 items"):
        draw(["u"], [1], [()], ["", "Soap", "soap", "a b", "A  B"], ["[PAD]", *"wxyz"], number=2, seed=0, split="test")


def test_items_without_a_title_are_not_equal() -> None:
    assert draw(["u"], [1], [()], ["", "", "", ""], ["[PAD]", *"xyz"], number=2, seed=0, split="t").shape == (1, 3)


def test_the_last_item_of_the_catalogue_is_found() -> None:
    size = 2_000
    ids, titles = ["[PAD]", *map(str, range(1, size + 1))], [f"t{item}" for item in range(size + 1)]
    for weights in (None, np.ones(size + 1)):
        rows = draw(["u"], [1], [set(range(1, size - 1))], titles, ids, number=2, seed=0, split="t", weights=weights)
        assert set(rows.tolist()[0]) == {1, size - 1, size}


def test_catalogue_too_small() -> None:
    with pytest.raises(ValueError, match=r"candidates\.num_negatives: 19 is too large, user 'u1' has only"):
        draw(**toy(exclude=[set(range(1, 50))] * 40))
    with pytest.raises(ValueError, match=r"candidates\.num_negatives: 0"):
        draw(**toy(number=0))


def test_a_user_does_not_depend_on_the_others() -> None:
    arguments = toy()
    order = np.random.default_rng(1).permutation(40)[:25]
    part = {key: [arguments[key][place] for place in order] for key in ("users", "targets", "exclude")}
    assert torch.equal(draw(**arguments | part), draw(**arguments)[order])


@pytest.mark.parametrize("weights", [None, np.arange(ITEMS + 1.0)])
def test_internal_ids_do_not_count(weights: np.ndarray | None) -> None:
    arguments = toy(weights=weights)
    new_to_old = np.concatenate([[0], 1 + np.random.default_rng(2).permutation(ITEMS)])
    old_to_new = np.argsort(new_to_old)
    renumbered = arguments | {
        "targets": old_to_new[arguments["targets"]].tolist(),
        "exclude": [old_to_new[list(known)] for known in arguments["exclude"]],
        "titles": [TITLES[item] for item in new_to_old],
        "item_ids": [IDS[item] for item in new_to_old],
        "weights": None if weights is None else weights[new_to_old],
    }
    assert as_tokens(draw(**renumbered), renumbered["item_ids"]) == as_tokens(draw(**arguments), IDS)


def test_so_many_of_the_new_items_and_at_any_slot() -> None:
    users = [f"u{user}" for user in range(3_000)]
    new, titles = frozenset(range(51, ITEMS + 1)), [f"t{item}" for item in range(ITEMS + 1)]
    arguments: dict[str, Any] = {"number": 5, "seed": 1, "split": "test", "new": new}
    rows = draw(users, [60] * len(users), [{1, 51}] * len(users), titles, IDS, new_number=2, **arguments)
    others = rows[rows != 60].view(-1, 5) > 50  # [N, 5], in order of slots
    assert (others.sum(1) == 2).all() and not torch.isin(rows, torch.tensor([1, 51])).any()
    assert chisquare(others.sum(0)).pvalue > 0.001  # else a new item at the first slot would be the target
    for number, drawn in ((0, set(range(2, 51))), (5, set(range(52, 60)))):
        rows = draw(users, [60] * len(users), [{1, 51}] * len(users), titles, IDS, new_number=number, **arguments)
        assert set(rows[rows != 60].tolist()) == drawn
    with pytest.raises(ValueError, match=r"only 13 items left .*; 9 of them from 10 held-out items, the others from"):
        draw(["u"], [60], [{51}], titles, IDS, new_number=9, **arguments | {"number": 14})


def test_global_random_state_is_neither_read_nor_changed() -> None:
    np.random.seed(1)
    first, after = draw(**toy()), np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    assert torch.equal(draw(**toy()), first)


@pytest.mark.parametrize("change", [{"seed": 2021}, {"split": "valid"}, {"users": [f"v{i}" for i in range(40)]}])
def test_seed_split_and_user_change_the_draw(change: dict[str, Any]) -> None:
    assert (draw(**toy(**change)) != draw(**toy())).any(dim=1).all()


def test_slots_and_items_are_uniform() -> None:
    users = [f"u{user}" for user in range(10_000)]
    titles = [f"t{item}" for item in range(ITEMS + 1)]
    rows = draw(users, [7] * len(users), [{8, 9}] * len(users), titles, IDS, number=4, seed=1, split="test")
    slots = (rows == 7).nonzero()[:, 1]
    assert chisquare(torch.bincount(slots, minlength=5)).pvalue > 0.001
    negatives = torch.bincount(rows[rows != 7], minlength=ITEMS + 1)
    eligible = [item for item in range(1, ITEMS + 1) if item not in (7, 8, 9)]
    assert chisquare(negatives[eligible]).pvalue > 0.001


def test_popularity_follows_the_weights() -> None:
    users = [f"u{user}" for user in range(5_000)]
    titles = [f"t{item}" for item in range(ITEMS + 1)]
    weights = np.arange(ITEMS + 1.0)
    weights[ITEMS] = 0
    rows = draw(users, [1] * len(users), [()] * len(users), titles, IDS, number=1, seed=1, split="t", weights=weights)
    counts = torch.bincount(rows[rows != 1], minlength=ITEMS + 1)
    assert counts[ITEMS] == 0
    expected = weights[2:ITEMS] / weights[2:ITEMS].sum() * len(users)
    assert chisquare(counts[2:ITEMS], expected).pvalue > 0.001


def test_popularity_holds_when_all_that_is_popular_is_history() -> None:
    users = [f"u{user}" for user in range(2_000)]
    weights = np.array([0, 1e12, 1, 3, 0])
    rows = draw(
        users,
        [4] * len(users),
        [{1}] * len(users),
        ["", *"abcd"],
        ["[PAD]", *"wxyz"],
        number=1,
        seed=1,
        split="t",
        weights=weights,
    )
    counts = torch.bincount(rows[rows != 4], minlength=4)
    assert counts[1] == 0 and chisquare(counts[2:], [500, 1500]).pvalue > 0.001


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_weights(bad: float) -> None:
    weights = np.ones(ITEMS + 1)
    weights[3] = bad
    with pytest.raises(ValueError, match=r"candidates\.source"):
        draw(**toy(weights=weights))
    with pytest.raises(ValueError, match=r"candidates\.source"):
        draw(**toy(weights=np.zeros(ITEMS + 1)))


def test_a_retrievers_ranking_is_hidden_and_its_items_are_kept() -> None:
    ranked = [list(range(1, 11)), list(range(20, 30))]
    rows = in_random_order(ranked, 3)
    assert rows.shape == (2, 10) and torch.equal(rows, in_random_order(ranked, 3))
    assert [sorted(row) for row in rows.tolist()] == ranked and rows.tolist() != ranked
    assert not torch.equal(rows, in_random_order(ranked, 4))


# -- sets --------------------------------------------------------------------------------------------------------------


def made(resolved: list[int]) -> CandidateSet:
    """Three pairs, whose items are appended to ``resolved`` when they are read."""
    items = torch.tensor([[1, 2], [3, 4], [6, 5]])
    return CandidateSet(
        torch.tensor([7, 9, 8]), torch.tensor([2, 3, 5]), "name", lambda: (resolved.append(1), (items, "digest"))[1]
    )


def test_items_are_resolved_once_and_not_before_they_are_read() -> None:
    resolved: list[int] = []
    found = made(resolved)
    part = found.subset(torch.tensor([0, 2]))
    assert found.covers(torch.tensor([7, 6])).tolist() == [True, False] and found.identity == "name"
    assert part.users.tolist() == [7, 8] and part.targets.tolist() == [2, 5]
    with pytest.raises(ValueError, match="2 of 2 users have none"):
        found.lookup(torch.tensor([9, 8]), torch.tensor([5, 3]))
    assert not resolved and "tensor" in repr(found)
    assert part.items.tolist() == [[1, 2], [6, 5]] and part.sha256 == found.sha256 == "digest"
    assert found.lookup(torch.tensor([8, 7]), torch.tensor([5, 2])).tolist() == [[6, 5], [1, 2]]
    assert part.lookup(torch.tensor([8]), torch.tensor([5])).tolist() == [[6, 5]]
    assert resolved == [1]


def test_a_subset_has_an_identity_of_its_own() -> None:
    subsets = [made([]).subset(torch.tensor(rows)).identity for rows in ([0, 1], [0, 2], [0, 1])]
    assert subsets[0] == subsets[2] and len({"name", *subsets}) == 3
