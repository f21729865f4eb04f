"""Ties of time: one order of equal times for every model, and the share of targets that it decides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.histories import Histories
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.data.scenarios import draw_lots
from recbole_llm.data.split_facts import split_facts, split_lines
from recbole_llm.data.ties import ORDERS
from tests.conftest import write_rows
from tests.data.test_repeats import tokens

Row = tuple[str, str, float]
DAY = 1_600_000_000


@pytest.fixture(scope="module")
def days() -> list[Row]:
    """30 users with 6 to 25 items on 3 days, which are the only times; the file is in no order."""
    rng, rows = np.random.default_rng(0), []
    for user in range(30):
        items = rng.permutation(60)[: int(rng.integers(6, 26))].tolist()
        rows += [(f"u{user}", str(item), DAY + 86_400 * int(rng.integers(3))) for item in items]
    return [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]


def expected(rows: list[Row], rule: str, seed: int = 2020) -> dict[str, list[str]]:
    """Each user's items in the order that the rule gives, spelled out."""
    if rule == "item":
        rows = sorted(rows, key=lambda row: int(row[1]))
    if rule == "random":
        lots = draw_lots([f"{user}\t{item}" for user, item, _ in rows], seed, "tie_order").tolist()
        rows = [row for _, row in sorted(zip(lots, rows, strict=True), key=lambda pair: pair[0])]
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        found.setdefault(user, []).append(item)
    return found


def load(folder: Path, model: str = "BPR", **values: Any) -> tuple[LLMConfig, Any]:
    config = LLMConfig(model, "days", config_dict={"data_path": str(folder), "candidates": {"num_negatives": 5}, **values})
    return config, create_dataset(config)


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_histories_and_the_splits_of_recbole_have_the_order_of_the_rule(
    model: str, rule: str, days: list[Row], tmp_path: Path
) -> None:
    config, dataset = load(write_rows(tmp_path, "days", days), model, tie_order=rule)
    truth = expected(days, rule)
    assert all(expected(days, other) != truth for other in ORDERS if other != rule)
    assert tokens(dataset.histories) == truth
    train, *loaders = (loader._dataset for loader in data_preparation(config, dataset))
    for data, place in zip(loaders, (-2, -1), strict=True):
        pairs = (data.id2token(field, data.inter_feat[field]) for field in ("user_id", "item_id"))
        assert dict(zip(*pairs, strict=True)) == {user: items[place] for user, items in truth.items()}
    if model == "SASRec":
        longest = int(train.inter_feat["item_length"].max())
        row = int(train.inter_feat["item_length"].argmax())
        items = train.id2token("item_id", train.inter_feat["item_id_list"][row][:longest])
        assert list(items) == truth[train.id2token("user_id", train.inter_feat["user_id"][row])][:longest]


def test_times_are_all_different_when_recbole_sorts(days: list[Row], tmp_path: Path) -> None:
    _, dataset = load(write_rows(tmp_path, "days", days))
    dataset.build()
    assert len(np.unique(dataset.inter_feat["timestamp"].numpy())) == len(days)


@pytest.mark.parametrize("rule", ["item", "random"])
def test_these_orders_do_not_depend_on_the_order_of_the_file(rule: str, days: list[Row], tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(days, len(days))
    found = [
        tokens(load(write_rows(tmp_path / str(n), "days", rows), tie_order=rule)[1].histories)
        for n, rows in enumerate((days, shuffled))
    ]
    assert found[0] == found[1]


def test_random_depends_on_the_seed_of_the_candidates_and_not_on_that_of_the_run(days: list[Row], tmp_path: Path) -> None:
    folder = write_rows(tmp_path, "days", days)
    found = {
        (seed, own): tokens(load(folder, tie_order="random", seed=seed, candidates={"seed": own})[1].histories)
        for seed in (1, 2)
        for own in (5, 6)
    }
    assert found[1, 5] == found[2, 5] == expected(days, "random", 5) != found[1, 6] == found[2, 6]


def test_ids_that_are_not_all_numbers_are_compared_as_text(tmp_path: Path) -> None:
    for ids, order in ((["9", "10", "011"], ["9", "10", "011"]), (["9", "10", "x"], ["10", "9", "x"])):
        rows = [("u", item, DAY) for item in reversed(ids)]
        assert tokens(load(write_rows(tmp_path / ids[2], "days", rows), tie_order="item")[1].histories) == {"u": order}


def test_models_inside_a_run_have_the_order_of_the_run(days: list[Row], tmp_path: Path) -> None:
    folder = write_rows(tmp_path, "days", days)
    for rule in ORDERS:
        config, dataset = load(folder, tie_order=rule, candidates={"seed": 7}, checkpoint_dir=str(tmp_path / "saved"))
        part = CollaborativeModel(config, "Pop")
        assert part.histories.fingerprint == dataset.histories.fingerprint


def test_nothing_of_another_order_is_reused(days: list[Row], tmp_path: Path) -> None:
    folder, saved = write_rows(tmp_path, "days", days), str(tmp_path / "saved")
    found: dict[str, set[str]] = {"config": set(), "candidates": set(), "stage": set(), "record": set()}
    for rule in ORDERS:
        config, dataset = load(folder, tie_order=rule, checkpoint_dir=saved)
        found["config"].add(config.fingerprint)
        found["record"].add(str(config.record_file))
        found["candidates"].add(candidate_sets(config, dataset)["test"].sha256)
        found["stage"].add(CollaborativeModel(config, "Pop").stage.fingerprint)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 3)


def test_united_datasets_keep_the_order_and_the_ties_of_each(days: list[Row], tmp_path: Path) -> None:
    other = [(user, item, time) for user, item, time in days if int(item) % 2]
    folder = write_rows(write_rows(tmp_path, "days", days), "other", other)
    for rule in ORDERS:
        config, dataset = load(folder, tie_order=rule, train_dataset="other")
        truth = {
            f"{name}/{user}": [f"{name}/{item}" for item in items]
            for name, rows in (("other", other), ("days", days))
            for user, items in expected(rows, rule).items()
        }
        assert tokens(dataset.histories) == truth
        alone = split_facts(*load(folder, tie_order=rule))["ties"]["tied_targets"]
        facts = split_facts(config, dataset)["ties"]
        assert facts["tie_order"] == rule and facts["tied_targets"]["test"] == alone["test"] > 0


# -- the share of tied targets -----------------------------------------------------------------------------------------


def test_the_share_of_targets_that_another_order_would_change(days: list[Row], tmp_path: Path) -> None:
    days = [(user, item, time + int(item) // 8) for user, item, time in days]
    config, dataset = load(write_rows(tmp_path, "days", days))
    times = {(user, item): time for user, item, time in days}
    shares = {}
    for phase, place in (("valid", -2), ("test", -1)):
        truth = expected(days, "file").items()
        shares[phase] = np.mean(
            [sum(times[user, item] == times[user, items[place]] for item in items) > 1 for user, items in truth]
        )
    assert split_facts(config, dataset)["ties"] == {"tie_order": "file", "tied_targets": shares}
    assert 0.1 < shares["test"] < shares["valid"] < 0.9
    line = f"tie_order: file, decide the targets of some users: validation {shares['valid']:.1%}, test {shares['test']:.1%}"
    assert line in split_lines(config, dataset)[0]


@pytest.mark.parametrize(
    ("times", "valid", "test"),
    [([1, 2, 3, 4, 5], 0, 0), ([1, 2, 3, 4, 4], 1, 1), ([1, 2, 3, 3, 4], 1, 0), ([1, 1, 3, 4, 5], 0, 0), ([1, 1, 1, 1, 1], 1, 1)],
)
def test_which_ties_decide(times: list[int], valid: int, test: int, tmp_path: Path) -> None:
    rows = [("u", str(place), DAY + time) for place, time in enumerate(times)]
    config, dataset = load(write_rows(tmp_path, "days", rows))
    assert split_facts(config, dataset)["ties"]["tied_targets"] == {"valid": valid, "test": test}
    assert bool(split_lines(config, dataset)) == bool(valid or test)


def test_a_tie_of_the_same_item_decides_nothing(tmp_path: Path) -> None:
    rows = [("u", str(place // 2), DAY + place // 2) for place in range(10)]
    config, dataset = load(write_rows(tmp_path, "days", rows), rm_dup_inter=None)
    assert split_facts(config, dataset)["ties"]["tied_targets"] == {"valid": 0, "test": 0}


# -- other splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("split", [{"RS": [0.5, 0.2, 0.3]}, {"TS": [0.5, 0.2, 0.3]}])
def test_other_splits_by_time_have_the_same_order(split: dict[str, Any], rule: str, days: list[Row], tmp_path: Path) -> None:
    days = [(user, item, time + int(item) // 8) for user, item, time in days]  # so that time splits them
    arguments = {"order": "TO", "split": split, "group_by": "user", "mode": "full"}
    config, dataset = load(write_rows(tmp_path, "days", days), tie_order=rule, eval_args=arguments)
    found: dict[str, list[str]] = {}
    for data in dataset.build():
        pairs = (data.id2token(field, data.inter_feat[field]) for field in ("user_id", "item_id"))
        for user, item in zip(*pairs, strict=True):
            found.setdefault(user, []).append(item)
    assert found == expected(days, rule)


def test_a_random_order_has_no_ties(days: list[Row], tmp_path: Path) -> None:
    folder = write_rows(tmp_path, "days", days)
    arguments = {"order": "RO", "split": {"RS": [8, 1, 1]}, "mode": "full"}
    with pytest.raises(ValueError, match=r"tie_order: item orders equal times, but eval_args has order: RO; give order: TO"):
        load(folder, tie_order="item", eval_args=arguments)
    config, dataset = load(folder, eval_args=arguments)
    assert dataset.build() and split_facts(config, dataset)["ties"]["tied_targets"] == {"valid": None, "test": None}


def test_an_unknown_order(days: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tie_order: 'id' is unknown; choose file, item, random"):
        load(write_rows(tmp_path, "days", days), tie_order="id")


def test_histories_without_times_have_no_share() -> None:
    from recbole_llm.data.ties import tied_targets

    assert tied_targets(Histories(["[PAD]", "u"], ["[PAD]", "a"], [np.empty(0), np.ones(4)]), "test") is None
