"""Slices: boundaries from training counts alone, and parts of a run's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset
from recbole_llm.evaluation import slices
from recbole_llm.evaluation.metrics import metrics
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.evaluation.slices import item_slices, parted, user_slices
from recbole_llm.quick_start import assemble
from tests.conftest import dealt_anew

SHARES = {"cold": 0.35, "warm": 0.35}


def items_of(counts: list[int], shares: dict[str, float] | None = None) -> dict[str, list[int]]:
    found = item_slices(np.array([0, *counts]), shares or SHARES)
    return {name: np.flatnonzero(mask).tolist() for name, mask in found.items()}


# -- which items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "cold", "warm"),
    [
        ([5, 4, 3, 2, 1, 6, 7, 8, 9, 10], [3, 4, 5], [8, 9, 10]),  # 3 of 10 each
        ([1, 1, 1, 1, 5, 5, 9, 9, 9, 9], [], []),  # four are equal at either boundary
        ([1, 1, 2, 2, 5, 5, 8, 8, 9, 9], [1, 2], [9, 10]),
        ([0, 0, 0, 0, 0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [8, 9, 10]),  # never trained: all of them
        ([3, 3, 3, 3], [], []),
        ([0, 0, 0, 0], [1, 2, 3, 4], []),
        ([2], [], []),
    ],
)
def test_a_slice_by_hand(counts: list[int], cold: list[int], warm: list[int]) -> None:
    assert items_of(counts) == {"cold": cold, "warm": warm}


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    cold=st.floats(0.01, 0.5),
    warm=st.floats(0.01, 0.5),
)
def test_slices_keep_their_share_and_apart(counts: list[int], cold: float, warm: float) -> None:
    found = items_of(counts, {"cold": cold, "warm": warm})
    level = {name: {counts[item - 1] for item in items} for name, items in found.items()}
    assert len(found["cold"]) <= max(cold * len(counts), counts.count(0)) and len(found["warm"]) <= warm * len(counts)
    assert max(level["cold"], default=-1) < min(level["warm"], default=7)
    assert 0 not in level["warm"] and ({0} & set(counts)) <= level["cold"]
    for name, items in found.items():  # items with equal counts share their slice
        assert [item for item, count in enumerate(counts, 1) if count in level[name]] == items


# -- which users -------------------------------------------------------------------------------------------------------


def test_boundaries_do_not_move_with_the_test_labels(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    header, *rows = [line.split("\t") for line in (data_path / "tiny" / "tiny.inter").read_text().splitlines()]
    changed = dealt_anew(rows, {user: item for user, item, _ in rows})  # the file is in time order within a user
    folder = tmp_path / "drawn" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.inter").write_text("\n".join("\t".join(row) for row in [header, *changed]) + "\n")

    found = []
    for path in (data_path, folder.parent):
        histories = create_dataset(LLMConfig("Pop", "tiny", config_dict={**settings, "data_path": str(path)})).histories
        slices = item_slices(histories.train_counts, SHARES)
        by_token = {name: {histories.item_ids[item] for item in np.flatnonzero(mask)} for name, mask in slices.items()}
        users = user_slices(histories, SHARES)
        for user in histories.evaluated("test").tolist():
            token = histories.item_ids[histories.target(user, "test")]
            assert {name: user in inside for name, inside in users.items()} == {
                name: token in inside for name, inside in by_token.items()
            }
        found.append((by_token, {name: {histories.user_ids[user] for user in inside} for name, inside in users.items()}))
    (items_before, users_before), (items_after, users_after) = found
    assert items_before == items_after and all(items_before.values())
    assert users_before != users_after


def test_ranks_are_parted_by_user_and_slices_of_nobody_or_everybody_left_out() -> None:
    ranks = Ranks(users=[5, 3, 9], ranks=[1, 4, 2], ties=[0, 1, 0])
    slices = {"cold": frozenset({3, 5, 77}), "warm": frozenset({4}), "all": frozenset({3, 5, 9})}
    assert parted(ranks, slices) == {"cold": Ranks(users=[5, 3], ranks=[1, 4], ties=[0, 1])}
    assert parted(Ranks(), slices) == {}


# -- slices of a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["candidates", "full"])
def test_slices_of_a_run_are_parts_of_its_result(mode: str, run: Callable[..., Any]) -> None:
    result, record = run("SASRec", eval_args={"mode": mode}, metric_decimal_place=12)
    ranks = record["ranks"]["SASRec"]
    whole = metrics(list(ranks.values()), result["test_result"])
    assert result["test_result"] == pytest.approx(whole, abs=1e-9)
    parts = record["slices"]["SASRec"]
    rest = 60 - sum(part["users"] for part in parts.values())
    for key, value in whole.items():
        found = sum(part["users"] * part[key] for part in parts.values())
        assert found - 1e-9 <= 60 * value <= found + rest + 1e-9


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"hot": 0.3}, "unknown key `hot` of slices in config_dict; did you mean `cold`"),
        ({"cold": 0}, r"slices\.cold: 0 in config_dict is not a number in \(0, 1\); give 0\.35, for example"),
        ({"warm": 1}, r"slices\.warm: 1 in config_dict is not a number in \(0, 1\); give 0\.35, for example"),
        ({"cold": "few"}, "slices.cold: 'few' in config_dict is not a number"),
    ],
)
def test_slices_that_are_none_are_refused_before_anything_is_read(shares: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(LLMConfig("Pop", "nosuch", config_dict={"slices": shares}))


def test_shares_of_which_an_item_could_be_in_both_are_refused() -> None:
    slices.check({"cold": 0.5, "warm": 0.5})
    with pytest.raises(ValueError, match="slices: .* the shares add up to more than 1"):
        slices.check({"cold": 0.7, "warm": 0.7})
