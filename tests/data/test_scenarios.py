"""What a scenario holds out stays out of all that is trained or chosen by, and only that is asked about at test."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.classical.retriever import Retriever
from recbole_llm.classical.windows import training_histories
from recbole_llm.config import LLMConfig
from recbole_llm.data import scenarios
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import dealt_anew
from tests.data.scenario_runs import SCENARIOS, Built, build, own_data

TESTED = {"new": 43, "cold": 13, "few": 60, "from": 60}
MODELS = ["BPR", "SASRec"]  # RecBole's general and sequential datasets
each_scenario = pytest.mark.parametrize("name", SCENARIOS)


@pytest.fixture(scope="module")
def made(module_settings: dict[str, Any]) -> Callable[..., Built]:
    """``made(model, name)``: :func:`build` of a scenario, or of none, done once."""
    return cache(lambda model, name=None: build(model, module_settings, **SCENARIOS.get(name, {})))


# -- what is held out --------------------------------------------------------------------------------------------------


def test_lots_depend_on_seed_purpose_and_token_alone() -> None:
    tokens = [f"t{number}" for number in range(2_000)]
    lots = scenarios.draw_lots(tokens, 1, "new_items")
    assert np.array_equal(scenarios.draw_lots(tokens[::-7], 1, "new_items"), lots[::-7])
    for seed, purpose in ((2, "new_items"), (1, "cold_users")):
        assert abs(np.corrcoef(lots, scenarios.draw_lots(tokens, seed, purpose))[0, 1]) < 0.1
    assert 0 <= lots.min() < lots.max() < 1 and np.allclose(np.quantile(lots, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)


@pytest.mark.parametrize(
    ("history", "left"),  # capitals are new
    [
        ("abcXdYeZ", "abcdeZ"),
        ("abcXdef", "abcX"),
        ("abXcdYe", "abcdY"),
        ("abXc", "abc"),
        ("abX", "ab"),
        ("XYabcZZd", "abcZ"),
        ("abcd", "abcd"),
        ("XYZ", ""),
    ],
)
def test_the_last_new_item_after_three_others_ends_a_history(history: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    item_ids = ["[PAD]", *"abcdefXYZ"]
    monkeypatch.setattr(scenarios, "draw_lots", lambda *_: np.array([0.0, *[0.9] * 6, *[0.1] * 3]))
    config = {**dict.fromkeys(scenarios.KEYS), "new_items": 0.5, "candidates": {"seed": 1}}
    rows = [(1, "a"), (1, "b"), *((2, item) for item in history), (3, "a"), (3, "b"), (3, "c"), (3, "Z")]
    users = np.array([user for user, _ in rows])
    items = np.array([item_ids.index(item) for _, item in rows])
    kept, scenario = scenarios.hold_out(config, users, items, ["[PAD]", "u1", "u2", "u3"], item_ids)
    assert "".join(item for (user, item), stays in zip(rows, kept, strict=True) if user == 2 and stays) == left
    assert kept[users != 2].all() and scenario.new == {7, 8, 9} and scenario.untrained == frozenset()
    assert scenario.tested == ({2, 3} if left[-1:].isupper() else {3})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("new", "new_items: 0.2 holds 10 of 40 items and 0 of 60 users out of training; 43 test users, 57 validation users"),
        ("cold", "cold_users: 0.3 holds 0 of 40 items and 13 of 60 users out of training; 13 test users, 47 validation users"),
        ("few", "train_users: 20 holds 0 of 40 items and 40 of 60 users out of training; 60 test users, 20 validation users"),
        ("from", "train_dataset: other holds 40 of 80 items and 60 of 120 users out of .*; 60 test users, 60 validation users"),
    ],
)
def test_the_log_says_what_was_held_out(name: str, line: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        built = build("Pop", settings, **SCENARIOS[name])
    assert re.search(line, caplog.text)
    assert len(built.candidates["test"].users) == TESTED[name]


# -- leaks -------------------------------------------------------------------------------------------------------------


@each_scenario
@pytest.mark.parametrize("model", MODELS)
def test_nothing_held_out_is_trained_or_validated_on(name: str, model: str, made: Callable[..., Built]) -> None:
    built = made(model, name)
    histories, new, untrained = built.histories, built.new, built.untrained
    assert new or untrained
    for phase in ("train", "valid"):
        seen = {token for row in built.rows(phase) for token in row}
        assert seen and not seen & (new | untrained)
    for user, items in enumerate(histories.items):
        trained = built.items(histories.train(user))
        assert not set(trained) & new and len(trained) == (0 if histories.user_ids[user] in untrained else max(len(items) - 2, 0))
    for user in histories.evaluated("valid"):
        assert not set(built.items(histories.before(user, "valid"))) & new
    asked = built.asked("valid")
    assert asked.keys() == {row[0] for row in built.rows("valid")} and not asked.keys() & untrained
    assert not {item for target, others in asked.values() for item in (target, *others)} & new


@each_scenario
@pytest.mark.parametrize("model", MODELS)
def test_all_that_is_held_out_is_tested_and_nothing_else(name: str, model: str, made: Callable[..., Built]) -> None:
    built, whole = made(model, name), made(model)
    asked = built.asked("test")
    assert {row[0]: row[1] for row in built.rows("test")} == {user: target for user, (target, _) in asked.items()}
    if name == "new":
        assert {target for target, _ in asked.values()} <= built.new
        assert all(sum(item in built.new for item in others) == 4 for _, others in asked.values())  # of 9
    elif name == "from":
        assert asked.keys() == built.untrained == {f"tiny/u{user}" for user in range(60)}
        assert {item for _, others in asked.values() for item in others} <= built.new == {f"tiny/i{i}" for i in range(40)}
        assert asked["tiny/u7"][0] == "tiny/" + whole.asked("test")["u7"][0]
    elif name == "few":
        assert asked == whole.asked("test")  # so a table of several K compares like with like
        assert len({row[0] for row in built.rows("train")}) == 20
    else:
        assert asked.keys() == built.untrained
        first = {user: built.items(items[:3]) for user, items in zip(whole.users(range(61)), whole.histories.items, strict=True)}
        for user in built.histories.scenario.untrained:
            token = built.histories.user_ids[user]
            assert built.items(built.histories.items[user]) == first[token] and asked[token][0] == first[token][-1]


@each_scenario
def test_whole_sequences_are_those_of_the_trained_users(name: str, made: Callable[..., Built]) -> None:
    built = made("SASRec", name)
    found = [history.tolist() for history in training_histories(built.splits[0])]
    rows = [built.histories.train(user).tolist() for user in built.histories.evaluated("valid")]
    short = 3 if name == "new" else 0  # users whom the cut left with less than four interactions: trained on, not asked
    assert all(row in found for row in rows if len(row) > 1) and len(found) <= len(rows) + short


@each_scenario
@pytest.mark.parametrize("model", MODELS)
def test_no_test_label_touches_what_is_trained_or_validated_on(
    name: str, model: str, made: Callable[..., Built], settings: dict[str, Any], data_path: Path, tmp_path: Path
) -> None:
    """The targets of all tested users dealt out anew: new ones among themselves."""
    before = made(model, name)
    targets = {user.removeprefix("tiny/"): target.removeprefix("tiny/") for user, (target, _) in before.asked("test").items()}
    dealt = own_data(data_path, tmp_path / "dealt", lambda rows: dealt_anew(rows, targets))
    after = build(model, {**settings, "data_path": dealt}, **SCENARIOS[name])
    assert before.asked("test") != after.asked("test")
    for phase in ("train", "valid"):
        assert before.rows(phase) == after.rows(phase)
    assert before.candidates["valid"].sha256 == after.candidates["valid"].sha256
    assert (before.new, before.untrained) == (after.new, after.untrained)


# -- the same for every model, on every machine ------------------------------------------------------------------------


@each_scenario
def test_neither_internal_ids_nor_rows_nor_model_nor_seed_change_it(
    name: str, made: Callable[..., Built], settings: dict[str, Any], data_path: Path, tmp_path: Path
) -> None:
    first = made("BPR", name)
    shuffled = own_data(data_path, tmp_path / "shuffled", lambda rows: np.random.default_rng(0).permutation(rows).tolist())
    other = build("SASRec", {**settings, "data_path": shuffled, "seed": 7}, **SCENARIOS[name])
    assert first.histories.item_ids != other.histories.item_ids and first.asked("test") == other.asked("test")
    assert [found.sha256 for found in first.candidates.values()] == [found.sha256 for found in other.candidates.values()]
    assert (other.new, other.untrained) == (first.new, first.untrained)


def test_scenarios_keep_their_candidates_apart(settings: dict[str, Any], tmp_path: Path) -> None:
    built = [build("Pop", settings, **values) for values in ({}, *SCENARIOS.values(), {"cold_users": 0.3, "cold_user_length": 4})]
    labels = ["", ".new0.2", ".cold0.3x3", ".few20", ".from-other", ".cold0.3x4"]
    names = {f"tiny{label}.{phase}.uniform9-2020.candidates" for label in labels for phase in ("valid", "test")}
    assert {file.name for file in (tmp_path / "saved" / "candidates").glob("*.candidates")} == names
    shas = [[found.candidates[phase].sha256 for found in built] for phase in ("valid", "test")]
    assert len(set(shas[0])) == 5 and shas[0][2] == shas[0][5]  # how short cold users are is nothing to the others
    assert len(set(shas[1])) == 5 and shas[1][0] == shas[1][3]  # train_users asks whom a whole run asks
    fingerprints = {found.histories.fingerprint for found in built}
    assert len(fingerprints) == 6


def test_another_seed_of_the_candidates_holds_out_others_and_a_larger_share_holds_the_smaller(
    settings: dict[str, Any],
) -> None:
    def held_out(**values: Any) -> frozenset[int]:
        config = LLMConfig("Pop", "tiny", config_dict={**settings, **values})
        scenario = create_dataset(config).histories.scenario
        return scenario.new or scenario.untrained

    for key, small, large in (("new_items", 0.1, 0.3), ("cold_users", 0.1, 0.3), ("train_users", 30, 10)):
        assert held_out(**{key: small}) < held_out(**{key: large}) != held_out(**{key: large, "candidates": {"seed": 1}})


# -- other models and other modes of one run ---------------------------------------------------------------------------


def test_another_model_of_the_run_has_its_scenario_and_another_dataset_has_none(settings: dict[str, Any]) -> None:
    for values in SCENARIOS.values():
        config = LLMConfig("TALLRec", "tiny", config_dict={**settings, **values, "candidates": {"seed": 5, "num_negatives": 3}})
        (key,) = values
        other = config.for_model("SASRec", {"eval_args": {"mode": "full"}})
        assert (other[key], other["candidates"]["seed"]) == (config[key], 5)
        assert create_dataset(other).histories.fingerprint == create_dataset(config).histories.fingerprint
        assert scenarios.active(config.for_dataset("other")) is None
        assert scenarios.active(config.for_dataset("tiny")) == key  # as one of general_datasets it would tell what is held out
        whole = config.for_dataset("tiny", whole=True)
        assert scenarios.active(whole) is None and whole["category_field"] == "genre"
    plain = LLMConfig("TALLRec", "tiny", config_dict={**settings, "candidates": {"seed": 5, "num_negatives": 3}})
    assert plain.for_model("SASRec", {})["candidates"]["seed"] == 2020  # no scenario, nothing that it would change


def test_a_full_ranking_masks_the_history_of_users_held_out(settings: dict[str, Any]) -> None:
    config = LLMConfig("BPR", "tiny", config_dict={**settings, "cold_users": 0.3, "eval_args": {"mode": "full"}})
    dataset = create_dataset(config)
    test = data_preparation(config, dataset)[2]
    (interaction, _, _, targets), *_ = test
    assert len(interaction) == len(targets)
    for user, own in zip(interaction["user_id"].tolist(), targets.tolist(), strict=True):
        target = torch.tensor([dataset.histories.target(user, "test")])
        rows, known = test._dataset.known_items.of(torch.tensor([user]), torch.tensor([0]), target)
        assert sorted(known.tolist()) == sorted(dataset.histories.before(user, "test").tolist()) and not rows.any()
        assert own == target.item()


def test_a_full_ranking_across_two_catalogues_is_refused(settings: dict[str, Any]) -> None:
    modes = {"valid": "candidates", "test": "full"}
    with pytest.raises(ValueError, match=r"full ranking at test would put the items of other and tiny in one list"):
        build("SASRec", settings, train_dataset="other", eval_args={"mode": modes})


@pytest.mark.parametrize("source", ["popularity", "retriever"])
def test_candidates_by_what_training_knows(source: str, settings: dict[str, Any]) -> None:
    candidates = {"source": source, "num_negatives": 9}
    values = {"candidates": candidates, "retriever_config": {"epochs": 1}}
    for name in ("new", "from"):
        with pytest.raises(
            ValueError, match=f"source {source} depends on training interactions.*that {next(iter(SCENARIOS[name]))}"
        ):
            build("Pop", settings, **SCENARIOS[name], **values)
    config = LLMConfig("Pop", "tiny", config_dict={**settings, **SCENARIOS["cold"], **values})
    found = candidate_sets(config, create_dataset(config), Retriever(config))["test"]
    assert len(found.users) == TESTED["cold"]


@each_scenario
@pytest.mark.parametrize("model", [*MODELS, "TALLRec"])
def test_a_run(name: str, model: str, made: Callable[..., Built], settings: dict[str, Any]) -> None:
    result = run_recbole_llm(model, "tiny", config_dict={**settings, **SCENARIOS[name], "lora_epochs": 1})
    record = json.loads(Path(result["record"]).read_text())
    assert all(np.isfinite(value) for value in result["test_result"].values())
    assert len(record["ranks"][model]) == TESTED[name] and set(record["ranks"][model].values()) <= set(range(1, 11))
    assert record["candidates_sha256"] == {phase: found.sha256 for phase, found in made("BPR", name).candidates.items()}


@pytest.mark.slow
@each_scenario
@pytest.mark.parametrize("model", ["Pop", "NeuMF", "LightGCN", "ItemKNN", "MultiVAE", "GRU4Rec", "BERT4Rec"])
def test_a_run_of_other_models(name: str, model: str, made: Callable[..., Built], settings: dict[str, Any]) -> None:
    test_a_run(name, model, made, settings)


@pytest.mark.parametrize(("model", "name"), [("SASRec", "new"), ("BPR", "cold"), ("SASRec", "few")])
def test_a_run_with_full_ranking(model: str, name: str, settings: dict[str, Any]) -> None:
    values = {**SCENARIOS[name], "eval_args": {"mode": "full"}}
    record = json.loads(Path(run_recbole_llm(model, "tiny", config_dict={**settings, **values})["record"]).read_text())
    assert len(record["ranks"][model]) == TESTED[name]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_items": 0.1, "train_users": 8}, r"new_items: 0\.1 and train_users: 8: a run has one scenario, remove one"),
        ({"new_items": 1}, r"new_items: 1 in config_dict is not a number in \(0, 1\) or ~; remove it"),
        ({"cold_users": "many"}, r"cold_users: 'many' in config_dict is not a number in \(0, 1\) or ~; remove it"),
        (
            {"cold_users": 0.1, "cold_user_length": 2},
            r"cold_user_length: 2 in config_dict is not a whole number of at least 3; remove it to use the default, 3",
        ),
        ({"train_users": 1}, r"train_users: 1 in config_dict is not a whole number of at least 2 or ~; remove it"),
        ({"train_users": 0.5}, r"train_users: 0\.5 in config_dict is not a whole number of at least 2 or ~; remove it"),
        ({"train_users": 61}, r"train_users: 61 is more than the 60 users with four interactions; lower it"),
        ({"train_dataset": "tiny"}, r"train_dataset: 'tiny' must name another dataset than the tested one, 'tiny'"),
        ({"train_dataset": "nosuch"}, r"--dataset=nosuch: .*nosuch\.inter"),
        ({"new_items": 0.001}, r"new_items: 0\.001 leaves 60 validation users and 0 test users; change it or candidates\.seed"),
        ({"new_items": 0.99}, r"new_items: 0\.99 leaves 0 validation users"),
        ({"cold_users": 0.1, "cold_user_length": 50}, r"cold_users: 0\.1 leaves 60 validation users and 0 test users"),
        ({"new_items": 0.1, "eval_args": {"mode": "uni5"}}, r"eval_args: new_items needs mode: candidates or full, not .*uni5"),
        (
            {"cold_users": 0.1, "eval_args": {"mode": "full", "split": {"RS": [0.8, 0.1, 0.1]}}},
            r"eval_args: cold_users needs the last item of each user as target, split: \{'LS': 'valid_and_test'\}.*RS",
        ),
        (
            {"new_items": 0.1, "benchmark_filename": ["train", "valid", "test"]},
            r"benchmark_filename: new_items needs a single .inter file",
        ),
    ],
)
def test_bad_values_name_key_value_and_remedy(values: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create_dataset(LLMConfig("SASRec", "tiny", config_dict={**settings, **values}))
