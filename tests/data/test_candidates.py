from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from recbole_llm.data import candidates as module
from recbole_llm.data.candidates import CandidateSet, candidate_path, draw, load_or_draw, read_candidates

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


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, CandidateSet]:
    path = candidate_path(tmp_path, dataset="toy", split="test", source="uniform", number=19, seed=2020)
    assert candidate_path(tmp_path, dataset="toy", split="test", source="uniform", number=19, seed=2020, scenario="new0.1") == (
        tmp_path / "toy.new0.1.test.uniform19-2020.candidates"
    )
    arguments = toy()
    users, targets = torch.arange(1, 41), torch.tensor(arguments["targets"])
    return path, load_or_draw(path, users, targets, USER_IDS, IDS, lambda: draw(**arguments))


def test_file(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    assert path.name == "toy.test.uniform19-2020.candidates"
    lines = path.read_text().split("\n")
    assert lines[0] == "user_id:token\titem_id:token\tcandidates:token_seq" and lines[-1] == ""
    users = [line.split("\t")[0] for line in lines[1:-1]]
    assert users == sorted(USER_IDS[1:])
    assert module.sha256(path.read_bytes()).hexdigest() == found.sha256


def test_what_is_read_is_what_was_drawn(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    arguments = toy()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    users, targets = torch.arange(1, 41)[order], torch.tensor(arguments["targets"])[order]
    assert torch.equal(found.lookup(users, targets), draw(**arguments)[order])
    renumbered = ["[PAD]", *reversed(IDS[1:])]
    other = read_candidates(path, USER_IDS, renumbered)
    assert other.sha256 == found.sha256
    assert as_tokens(other.items, renumbered) == as_tokens(found.items, IDS)


def test_lookup_and_covers(stored: tuple[Path, CandidateSet]) -> None:
    _, found = stored
    user, target = found.users[:1], found.targets[:1]
    with pytest.raises(ValueError, match=r"1 of 2 users have none for their target, the first is user \d+ with item"):
        found.lookup(user.repeat(2), torch.cat([target, target % ITEMS + 1]))
    with pytest.raises(ValueError, match="the first is user 999"):
        found.lookup(torch.tensor([999]), target)
    assert found.covers(torch.tensor([1, 41, 40, 0])).tolist() == [True, False, True, False]


def test_a_stored_file_wins_over_a_new_draw(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    again = load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: pytest.fail("drawn again"))
    assert again.sha256 == found.sha256


def damage(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: damage(path, 1, "user_id", "users"), "line 1: the header must be"),
        (lambda path: damage(path, 3, "\t", " "), "line 3: 2 cells"),
        (lambda path: damage(path, 4, "u", "nobody"), "line 4: user 'nobody"),
        (lambda path: damage(path, 5, "\ti", "\tnothing"), "line 5: items .'nothing"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b" i", b" \xff", 1)), "line 2: items"),
        (lambda path: path.write_text(path.read_text()[:-1]), "line 40: the end is missing"),
        (lambda path: path.write_text(""), "line 1: the header"),
        (lambda path: path.write_text(path.read_text().split("\n")[0] + "\n"), "line 1: the end is missing"),
        (lambda path: path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n"), "line 42: the same"),
    ],
)
def test_damaged_file(stored: tuple[Path, CandidateSet], change: Any, message: str) -> None:
    path, found = stored
    change(path)
    with pytest.raises(ValueError, match=f"{path.name}, {message}.*delete it"):
        read_candidates(path, USER_IDS, IDS)
    rebuilt = load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: found.items)
    assert rebuilt.sha256 == found.sha256


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mine.candidates"
    path.write_text("\n".join(["user_id:token\titem_id:token\tcandidates:token_seq", *lines, ""]))
    return path


def test_users_own_file(tmp_path: Path) -> None:
    found = read_candidates(write(tmp_path, "u2\ti3\ti3 i4", "u1\ti1\ti2 i1"), USER_IDS, IDS)
    assert found.lookup(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [[2, 1], [3, 4]]
    for line, message in [
        ("u1\ti1\ti2 i1 i3", "line 3: 3 candidates, but 2 in line 2"),
        ("u1\ti1\ti1 i1", "line 3: a candidate stands there twice"),
        ("u1\ti1\ti2 i3", "line 3: the target is not among"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_candidates(write(tmp_path, "u2\ti3\ti3 i4", line), USER_IDS, IDS)
    missed = read_candidates(write(tmp_path, "u1\ti1\ti2 i3"), USER_IDS, IDS, target_required=False)
    assert missed.items.tolist() == [[2, 3]]
    with pytest.raises(FileNotFoundError, match="candidates"):
        read_candidates(tmp_path / "none", USER_IDS, IDS)


def test_a_file_for_other_targets_is_drawn_anew(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    targets = found.targets % ITEMS + 1
    items = torch.stack([targets, targets % ITEMS + 1], dim=1)
    again = load_or_draw(path, found.users, targets, USER_IDS, IDS, lambda: items)
    assert torch.equal(again.lookup(found.users, targets), items)


def test_item_ids_with_spaces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="item id 'a b' is empty or holds white space"):
        module.write_candidates(
            tmp_path / "x", torch.tensor([1]), torch.tensor([1]), torch.tensor([[1]]), USER_IDS, ["[PAD]", "a b"]
        )
    assert not list(tmp_path.iterdir())
