"""Which models can be a part, what their stage depends on, and the data that they are trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.retriever import Retriever
from recbole_llm.config import LLMConfig
from recbole_llm.store.stages import StageCache
from tests.classical.collaborative.conftest import SMALL, Make, asked
from tests.conftest import write_rows
from tests.contract import recbole_data

# -- which models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Pop", "ItemKNN"])
def test_a_model_without_vectors_is_refused_by_name(shared_settings: dict[str, Any], name: str) -> None:
    cf = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), name, SMALL)
    for ask in (lambda: cf.item_table, lambda: cf.user_states([1], [[2]]), lambda: cf.sequence_states([[2]])):
        with pytest.raises(ValueError, match=f"cf_model: {name} has no vectors .* choose SASRec, .*collaborative.py"):
            ask()


@pytest.mark.parametrize(("name", "reads"), [("Caser", "user, item_seq"), ("HGN", "seq_item, user"), ("CORE", "item_seq")])
def test_a_model_whose_forward_reads_more_or_less_is_refused_and_not_misread(
    shared_settings: dict[str, Any], name: str, reads: str
) -> None:
    cf = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), name, SMALL)
    for ask in (lambda: cf.user_states([1], [[2]]), lambda: cf.sequence_states([[2], []]), lambda: cf.state_width):
        with pytest.raises(ValueError, match=f"cf_model: {name} reads {reads}, not a history alone; choose SASRec"):
            ask()


# -- its stage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec", "NeuMF"])
def test_what_is_trained_does_not_depend_on_what_was_drawn_before(
    make: Make, shared_settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    first = make(name)
    torch.manual_seed(99)
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), name, SMALL)
    fresh = {key: tensor.clone() for key, tensor in again.model.state_dict().items()}
    again.load(StageCache(tmp_path).run(again.stage))
    assert again.stage.fingerprint == first.stage.fingerprint
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
    assert any(not torch.equal(again.model.state_dict()[key], tensor) for key, tensor in fresh.items())


@pytest.mark.parametrize("name", ["Pop", "ItemKNN", "LightGCN"])
def test_a_later_run_has_the_same_scores_from_the_cached_stage(
    shared_settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Also of a model that counts, and so has no weights."""
    ranked = []
    for _ in range(2):
        retriever = Retriever(LLMConfig("TALLRec", "tiny", config_dict={**shared_settings, "retriever": name}))
        retriever.load(StageCache(tmp_path).run(retriever.stage))
        ranked.append(retriever.top("test", 5))
    assert ranked[0] == ranked[1]


@pytest.mark.parametrize("name", ["SASRecCPR", "GRU4RecCPR", "DIEN"])
def test_a_retriever_that_reads_the_target_is_refused_before_training(shared_settings: dict[str, Any], name: str) -> None:
    values = {} if name == "DIEN" else {"reranker_CAN_NUM": 10}
    config = LLMConfig("TALLRec", "tiny", config_dict={**shared_settings, "retriever": name, "retriever_config": values})
    with pytest.raises(ValueError, match=f"retriever: {name} reads the column '.*' of a row to rank"):
        Retriever(config)


def test_a_model_that_counts_its_mask_as_an_item_scores_the_catalogue(tmp_path: Path) -> None:
    """S3Rec."""
    given = recbole_data.settings("S3Rec", "sequential", recbole_data.write(tmp_path / "data"), tmp_path)
    retriever = Retriever(
        LLMConfig("TALLRec", "rich", config_dict={**given, "retriever": "S3Rec", "retriever_config": {"pretrain_epochs": 1}})
    )
    retriever.load(StageCache(tmp_path).run(retriever.stage))
    assert retriever.scores(asked(retriever)[0]).size(1) == recbole_data.ITEMS + 1


def test_a_later_run_has_the_neighbours_of_the_training(shared_settings: dict[str, Any], tmp_path: Path) -> None:
    """NNCF's are drawn in its constructor, and are not saved."""
    values, found = {"epochs": 1, "train_batch_size": 64}, []
    for seed in (1, 2):
        np.random.seed(seed)
        cf = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), "NNCF", values)
        cf.load(StageCache(tmp_path).run(cf.stage))
        found.append(cf.scores(asked(cf)[0]))
    assert torch.equal(*found)


def test_a_later_run_has_the_draws_of_the_training_too(tmp_path: Path) -> None:
    """RippleNet's ripple sets are drawn in its constructor, and are no tensors."""
    run = {
        "data_path": str(recbole_data.write(tmp_path / "data")),
        "checkpoint_dir": str(tmp_path / "saved"),
        "show_progress": False,
    }
    graph = {"inter": ["user_id", "item_id", "timestamp"], "kg": ["head_id", "relation_id", "tail_id"], "link": "*"}
    values = {"epochs": 1, "embedding_size": 8, "n_memory": 4, "load_col": graph}
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        cf = CollaborativeModel(LLMConfig("ALLMRec", "rich", config_dict=run), "RippleNet", values)
        cf.load(StageCache(tmp_path / "stages").run(cf.stage))
        found.append(cf.scores(asked(cf)[0]))
    assert torch.equal(*found)
    torch.save({"state_dict": cf.model.state_dict()}, tmp_path / "ripple.pth")
    with pytest.raises(ValueError, match="cf_checkpoint: .*ripple.pth: RippleNet scores by what it has drawn .*trained here"):
        StageCache(tmp_path).run(
            CollaborativeModel(LLMConfig("ALLMRec", "rich", config_dict=run), "RippleNet", values, tmp_path / "ripple.pth").stage
        )


@pytest.mark.parametrize("name", ["SASRec", "NeuMF"])
def test_it_is_frozen_and_deterministic(make: Make, name: str) -> None:
    cf = make(name)
    assert not any(parameter.requires_grad for parameter in cf.model.parameters())
    assert not any(module.training for module in cf.model.modules())
    _, users, histories = asked(cf)
    states = cf.user_states(users, histories)
    assert torch.equal(cf.user_states(users, histories), states) and not states.requires_grad
    assert not cf.item_table.requires_grad


def test_only_what_recbole_reads_trains_it_anew(shared_settings: dict[str, Any]) -> None:
    def fingerprint(values: dict[str, Any], **changes: Any) -> str:
        config = LLMConfig("ALLMRec", "tiny", config_dict={**shared_settings, **changes})
        return CollaborativeModel(config, "SASRec", {**SMALL, **values}).stage.fingerprint

    result = {"hidden_size": 8}, {"epochs": 2}, {"learning_rate": 0.02}, {"MAX_ITEM_LIST_LENGTH": 9}
    found = [fingerprint(values) for values in ({}, *result)] + [fingerprint({}, seed=1)]
    found.append(fingerprint({}, mask_history=False))  # it is validated under a full ranking
    assert len(set(found)) == len(found)
    ours = {"alpha": 0.1, "epochs": 7, "eval_batch_size": 9, "max_history": 3, "noun": "film", "checkpoint_dir": "elsewhere"}
    assert fingerprint({}, **ours) == found[0]


def test_a_setting_without_a_default_of_recbole_and_a_table_of_features_train_it_anew(
    shared_settings: dict[str, Any], data_path: Path, tmp_path: Path
) -> None:
    def fingerprint(name: str, values: dict[str, Any], **changes: Any) -> str:
        config = LLMConfig("ALLMRec", "tiny", config_dict={**shared_settings, **changes})
        return CollaborativeModel(config, name, {**SMALL, **values}).stage.fingerprint

    assert fingerprint("FEARec", {"tau": 0.5}) != fingerprint("FEARec", {"tau": 1.0})
    shutil.copytree(data_path, tmp_path / "data")
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]}
    read, found = {"load_col": columns, "selected_features": ["genre"], "pooling_mode": "sum"}, []
    for genre in ("drama", "crime"):
        file = tmp_path / "data" / "tiny" / "tiny.item"
        file.write_text(file.read_text().replace("drama", genre))
        found.append(
            [
                fingerprint(name, given, data_path=str(tmp_path / "data"))
                for name, given in (("SASRecF", read), ("SASRecF", {**read, "load_col": None}), ("SASRec", {}))
            ]
        )
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert found[0][2] == found[1][2], "which SASRec does not read"


def test_changed_ratings_train_a_model_anew_that_reads_labels(
    shared_settings: dict[str, Any], data_path: Path, tmp_path: Path
) -> None:
    """The histories are the same, and so are those of a model that samples its negatives."""
    shutil.copytree(data_path, tmp_path / "data")
    file, labelled = tmp_path / "data" / "tiny" / "tiny.inter", {"train_neg_sample_args": None}
    header, *rows = file.read_text().splitlines()
    given = {**shared_settings, "data_path": str(tmp_path / "data"), "threshold": {"rating": 3}}
    cache, found = StageCache(tmp_path / "stages"), []
    for best in (4, 5):
        lines = [f"{row}\t{1 + place % best}" for place, row in enumerate(rows)]
        file.write_text("\n".join([f"{header}\trating:float", *lines, ""]))
        config = LLMConfig(
            "TALLRec", "tiny", config_dict={**given, "retriever": "NeuMF", "retriever_config": {**SMALL, **labelled}}
        )
        retriever = Retriever(config)
        retriever.load(cache.run(retriever.stage))
        other = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=given | {"threshold": None}), "NeuMF", SMALL)
        found.append((retriever.stage.fingerprint, retriever.item_table, other.stage.fingerprint))
    (first, table, sampled), (second, changed, sampled_again) = found
    assert first != second and not torch.equal(table, changed)
    assert sampled == sampled_again


def test_a_retriever_of_the_same_settings_is_the_same_model_trained_once(shared_settings: dict[str, Any], tmp_path: Path) -> None:
    config = LLMConfig("ALLMRec", "tiny", config_dict={**shared_settings, "retriever_config": SMALL})
    cache = StageCache(tmp_path)
    retriever = Retriever(config)
    assert not list(tmp_path.iterdir())  # its constructor trains nothing
    with pytest.raises(RuntimeError, match="retriever SASRec: it is not trained yet"):
        retriever.top("test", 3)
    retriever.load(cache.run(retriever.stage))
    assert retriever.identity == Retriever(config).identity and retriever.identity.startswith("SASRec-")
    with pytest.raises(ValueError, match=r"candidates\.num_negatives: 40 is too large, the retriever ranks at most \d+ items"):
        retriever.top("test", 41)
    cf = CollaborativeModel(config, "SASRec", SMALL)
    assert retriever.stage.fingerprint == cf.stage.fingerprint and cf.stage.name == "cf-SASRec"
    again = StageCache(tmp_path)
    cf.load(again.run(cf.stage))
    assert again.seconds == {"cf-SASRec": 0.0}
    assert torch.equal(cf.item_table, retriever.item_table)


def test_a_seed_of_its_own_is_that_of_its_training_whichever_run_trains_it(
    shared_settings: dict[str, Any], tmp_path: Path
) -> None:
    tables = []
    for seed in (1, 2):
        config = LLMConfig("ALLMRec", "tiny", config_dict={**shared_settings, "seed": seed})
        cf = CollaborativeModel(config, "SASRec", {**SMALL, "epochs": 1, "seed": 7})
        cf.load(StageCache(tmp_path / str(seed), seed).run(cf.stage))
        tables.append(cf.item_table)
    assert torch.equal(*tables)


def test_ties_at_the_border_of_a_retriever_fall_differently_for_each_user(
    shared_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = Retriever(LLMConfig("TALLRec", "tiny", config_dict={**shared_settings, "retriever": "Pop"}))
    monkeypatch.setattr(retriever, "_loaded", True)
    monkeypatch.setattr(retriever, "scores", lambda row: torch.zeros(len(row[retriever.config["USER_ID_FIELD"]]), 41))
    found = retriever.top("test", 3)
    assert len({item for items in found.values() for item in items}) > 30, "all items are as good"
    assert all(not {*items} & {*retriever.histories.excluded(user, "test").tolist()} for user, items in found.items())


# -- the data of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["TALLRec", "ALLMRec"])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"user_inter_num_interval": "[8,inf)"}, "user_inter_num_interval"),
        ({"val_interval": {"timestamp": "[0,1000000200]"}}, "val_interval"),
        ({"new_items": None}, "new_items"),  # the scenario of the run holds these out
    ],
)
def test_a_model_inside_a_run_is_trained_on_the_data_of_the_run(
    model: str, given: dict[str, Any], named: str, settings: dict[str, Any], assemble: Any
) -> None:
    key = "cf_config" if model == "ALLMRec" else "retriever_config"
    changes: dict[str, Any] = {"new_items": 0.2} if "new_items" in given else {}
    if model == "TALLRec":
        changes |= {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    with pytest.raises(
        ValueError, match=f"{key}: SASRec must be trained on the same items, .*; remove {named}, which is set for"
    ):
        assemble(model, settings, **changes, **{key: {**SMALL, **given}})


@pytest.mark.parametrize("given", ["eval_args", "dataset", "model"])
def test_the_split_of_a_model_inside_a_run_is_not_its_own(given: str, settings: dict[str, Any], assemble: Any) -> None:
    with pytest.raises(ValueError, match=f"cf_config: {given} is that of the run"):
        assemble("ALLMRec", settings, cf_config={**SMALL, given: {"mode": "full"} if given == "eval_args" else "other"})


def test_settings_that_a_model_inside_a_run_does_not_have_are_told(settings: dict[str, Any], caplog: Any) -> None:
    CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=settings), "BPR", {"hidden_size": 8, "embedding_size": 8})
    assert "hidden_size in cf_config changes nothing: BPR has no such setting" in caplog.text
    assert "embedding_size in cf_config" not in caplog.text


def test_the_files_of_a_model_inside_a_run_have_the_encoding_of_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path, "latin", [(f"ü{user}", f"i{step}", step) for user in range(9) for step in range(user, user + 6)])
    file = tmp_path / "latin" / "latin.inter"
    file.write_bytes(file.read_text().encode("latin-1"))
    config = LLMConfig("BPR", "latin", config_dict={**settings, "data_path": str(tmp_path), "encoding": "latin-1"})
    assert "ü3" in Retriever(config).histories.user_ids
