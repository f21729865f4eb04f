"""Rows without their table, samplers and splits with arrays: the same as RecBole's own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.sampler import Sampler

from recbole_llm.classical.windows import training_histories
from recbole_llm.config import LLMConfig
from recbole_llm.data.dataset import RankedTime
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.data.samplers import ArraySampler, UsedItems
from recbole_llm.data.sequences import SequenceRows

PHASES = ["train", "valid", "test"]


def splits(settings: dict[str, Any], model: str = "SASRec", **values: Any) -> tuple[Any, Any, LLMConfig]:
    """The splits of our dataset, and those that RecBole's own methods make of the same interactions."""
    config = LLMConfig(model, "tiny", config_dict={**settings, **values})
    return create_dataset(config).build(), by_recbole(config, SequentialDataset if model == "SASRec" else Dataset).build(), config


def by_recbole(config: LLMConfig, base: type) -> Any:
    methods = {name: getattr(Dataset, name) for name in ("_grouped_index", "_split_index_by_leave_one_out")}
    dataset = type(base.__name__, (RankedTime, base), methods)(config)
    _ = dataset.histories, dataset.masking
    return dataset


@pytest.mark.parametrize("values", [{"MAX_ITEM_LIST_LENGTH": 4}, {"eval_args": {"split": {"LS": "test_only"}, "mode": "full"}}])
def test_rows_are_recboles(values: dict[str, Any], settings: dict[str, Any]) -> None:
    ours, theirs, config = splits(settings, **values)
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine.inter_feat, SequenceRows)
        assert len(mine) == len(other) and mine.inter_feat.columns == other.inter_feat.columns
        for rows in ([0, 2, 1], slice(3, 7), torch.arange(5), np.arange(4), range(2, 6)) if len(mine) else ():
            batch, expected = mine[rows], other.inter_feat[[*rows] if isinstance(rows, range) else rows]
            assert type(batch) is Interaction
            for name in other.inter_feat:
                assert torch.equal(batch[name], expected[name]) and batch[name].dtype == expected[name].dtype
        assert "item_id_list" in mine.inter_feat._lists or not len(mine)  # no table so far
        assert all(torch.equal(mine.inter_feat[name], other.inter_feat[name]) for name in other.inter_feat)
        assert [*mine.field2seqlen.items()] == [*other.field2seqlen.items()]


def test_columns_of_lists_change_with_the_rows(settings: dict[str, Any]) -> None:
    rows = splits(settings)[0][0].inter_feat
    before = copy.deepcopy(rows).interaction
    rows.sort(by=["item_id", "timestamp"])
    order = np.lexsort((before["timestamp"], before["item_id"]))
    assert all(torch.equal(rows[name], values[order]) for name, values in before.items())
    again = pickle.loads(pickle.dumps(rows))
    assert "item_id_list" in rows and all(torch.equal(again[name], rows[name]) for name in rows)
    del rows["item_id_list"]
    rows.drop("timestamp")
    rows.update(Interaction({"item_id_list": torch.zeros(len(rows))}))
    assert rows["item_id_list"].sum() == 0 and rows.columns[-1] == "item_id_list" and "timestamp" not in rows


def test_an_unused_column_leaves_its_list_as_in_recbole(settings: dict[str, Any]) -> None:
    ours, theirs, _ = splits(settings, unused_col={"inter": ["timestamp"]})
    assert ours[0].inter_feat.columns == theirs[0].inter_feat.columns
    assert "timestamp_list" in ours[0][[0]] and "timestamp" not in ours[0][[0]]


def test_a_graph_of_the_rows_is_recboles(settings: dict[str, Any]) -> None:
    ours, theirs, _ = splits(settings)
    assert (ours[0].inter_matrix("csr") != theirs[0].inter_matrix("csr")).nnz == 0


def test_training_histories_build_no_table(settings: dict[str, Any]) -> None:
    config = LLMConfig("SASRec", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    train = data_preparation(config, dataset)[0]._dataset
    found = training_histories(train)
    assert "item_id_list" in train.inter_feat._lists
    expected = [dataset.histories.train(user) for user in range(1, dataset.user_num) if len(dataset.histories.train(user)) > 1]
    assert [items.tolist() for items in found] == [items.tolist() for items in expected]


@pytest.mark.parametrize("mode", ["valid_and_test", "test_only"])
def test_general_splits_have_recboles_rows(mode: str, settings: dict[str, Any]) -> None:
    ours, theirs, _ = splits(settings, "BPR", eval_args={"split": {"LS": mode}, "mode": "full"})
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(mine.inter_feat[name], other.inter_feat[name]) for name in other.inter_feat)


def test_users_with_few_interactions_stay_in_training(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    rows = [f"u{user}\ti{step}\t{step}" for user in (3, 1, 2) for step in range(user)]
    (tmp_path / "few" / "few.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    config = LLMConfig("BPR", "few", config_dict={"data_path": str(tmp_path), "eval_args": {"mode": "full"}})
    ours, theirs = create_dataset(config), by_recbole(config, Dataset)
    ours._change_feat_format()
    theirs._change_feat_format()
    found, expected = (data.leave_one_out("user_id", "valid_and_test") for data in (ours, theirs))
    assert [len(split) for split in found] == [3, 1, 2]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.inter_feat["item_id"], other.inter_feat["item_id"])


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_the_sampler_draws_as_recboles(distribution: str, settings: dict[str, Any]) -> None:
    built, _, _ = splits(settings, "BPR")
    ours, theirs = (kind(PHASES, built, distribution) for kind in (ArraySampler, Sampler))
    for phase in PHASES:
        mine, other = ours.set_phase(phase), theirs.set_phase(phase)
        assert [mine.used_ids[user] for user in range(built[0].user_num)] == other.used_ids.tolist()
        assert mine.used_ids[None] is None and mine.used_ids[np.array([1, 2])] == other.used_ids[[1, 2]].tolist()
        for users in (np.array([3, 1, 1, 2]), np.full(5, 4)):
            drawn = []
            for sampler in (mine, other):
                np.random.seed(0)
                drawn.append(sampler.sample_by_user_ids(users, None, 30))
            assert torch.equal(*drawn)


def test_a_user_with_all_items_has_no_negatives() -> None:
    used = UsedItems(np.array([1 * 3 + 1, 1 * 3 + 2, 2 * 3 + 1]), 3, 3)
    assert used[1] == {1, 2} and used[0] == set() and used.counts.tolist() == [0, 2, 1]
    assert used.contains(np.array([2, 2, 0]), np.array([1, 2, 1])).tolist() == [True, False, False]


def test_a_user_with_all_items_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    rows = [f"u1\ti{step}\t{step}" for step in range(12)]
    (tmp_path / "few" / "few.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    config = LLMConfig("BPR", "few", config_dict={"data_path": str(tmp_path), "eval_args": {"mode": "full"}})
    with pytest.raises(ValueError, match="user 'u1' has all 12 items, so there are no negatives"):
        data_preparation(config, create_dataset(config))


@pytest.mark.parametrize("values", [{}, {"train_neg_sample_args": None}, {"eval_args": {"mode": "uni5"}}])
@pytest.mark.parametrize("model", ["BPR", "Pop", "SASRec"])
def test_loaders_have_recboles_samplers(model: str, values: dict[str, Any], settings: dict[str, Any]) -> None:
    if model == "BPR" and "train_neg_sample_args" in values:
        pytest.skip("BPR is trained with negatives")
    from recbole.data import utils

    config = LLMConfig(model, "tiny", config_dict={**settings, "eval_args": {"mode": "full"}, **values})
    loaders = data_preparation(config, create_dataset(config))
    built = create_dataset(config)
    expected = utils.create_samplers(config, built, built.build())
    for loader, sampler in zip(loaders, expected, strict=True):
        mine = loader._sampler
        assert (mine is None) == (sampler is None)
        if mine is not None:
            assert (mine.phase, mine.distribution, mine.alpha) == (sampler.phase, sampler.distribution, sampler.alpha)
