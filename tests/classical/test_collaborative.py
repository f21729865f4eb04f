"""A RecBole model as a frozen part: its states, items and scores are RecBole's own, trained here or read from a file."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from safetensors.torch import save_file

from recbole_llm.classical import collaborative
from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.retriever import Retriever
from recbole_llm.classical.sequence import sequence_states
from recbole_llm.config import LLMConfig
from recbole_llm.store.stages import StageCache
from tests.conftest import write_dataset, write_rows

SMALL: dict[str, Any] = {
    "epochs": 1,
    "train_batch_size": 64,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "n_heads": 2,
    "mf_embedding_size": 8,
    "mlp_embedding_size": 8,
    "mlp_hidden_size": [16, 8],
    "learning_rate": 0.01,
}
SEQUENTIAL = ["SASRec", "GRU4Rec", "NextItNet", "BERT4Rec"]
GENERAL = ["BPR", "NeuMF", "LightGCN"]

Make = Callable[..., CollaborativeModel]


@pytest.fixture(scope="module")
def make(module_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(name, **values)``: a model that was trained, or taken over from ``checkpoint``, and loaded; made once."""
    kept: dict[str, CollaborativeModel] = {}
    cache = StageCache(tmp_path_factory.mktemp("stages"))

    def make(name: str, checkpoint: Any = None, values: dict[str, Any] | None = None, **changes: Any) -> CollaborativeModel:
        key = f"{name} {checkpoint} {values} {changes}"
        if key not in kept:
            config = LLMConfig("ALLMRec", "tiny", config_dict=module_settings)
            model = CollaborativeModel(config, name, {**SMALL, **changes} if values is None else values, checkpoint)
            model.folder = cache.run(model.stage)  # type: ignore[attr-defined]
            model.load(model.folder)  # type: ignore[attr-defined]
            kept[key] = model
        return kept[key]

    return make


def asked(cf: CollaborativeModel) -> tuple[Interaction, list[int], list[list[int]]]:
    """The test users as RecBole's own loader asks about them, and the same in plain lists."""
    interaction = next(iter(cf.loaders[2]))[0]
    users = interaction["user_id"].tolist()
    return interaction, users, [cf.histories.before(user, "test").tolist() for user in users]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# -- states, items, scores ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, "BPR", "LightGCN"])
def test_states_times_items_are_recboles_own_scores(make: Make, name: str) -> None:
    cf = make(name)
    interaction, users, histories = asked(cf)
    states, items = cf.user_states(users, histories), cf.item_table
    assert items.shape == (41, states.shape[1]) and len({*map(tuple, states.tolist())}) > 30
    bias = getattr(cf.model, "output_bias", 0)  # of BERT4Rec
    own = cf.model.full_sort_predict(interaction).view(len(users), -1)
    torch.testing.assert_close(states @ items.T + bias, own, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_a_state_is_what_the_forward_gives_for_the_padded_history(make: Make, name: str) -> None:
    cf = make(name)
    padded = torch.tensor([[3, 1, 4, *[0] * 47], [15, 9, *[0] * 48]])
    close(cf.user_states([1, 2], [[3, 1, 4], [15, 9]]), cf.model(padded, torch.tensor([3, 2])))


@torch.no_grad()
def test_nextitnet_is_read_as_it_was_trained_at_the_last_item_wherever_the_padding_ends(make: Make) -> None:
    cf, history = make("NextItNet"), [3, 1, 4, 15, 9]
    padded = torch.tensor([[*history, *[0] * 45]])
    every = sequence_states(cf.model, padded, torch.tensor([5]))  # [1, L, H]
    close(cf.user_states([1], [history]), every[:, 4])
    close(cf.user_states([1], [history[:3]]), every[:, 2])
    assert not torch.allclose(type(cf.model).forward(cf.model, padded), every[:, 4])  # RecBole's: of a padded column


@torch.no_grad()
def test_bert4recs_state_is_that_of_the_mask_behind_the_history(make: Make) -> None:
    cf = make("BERT4Rec")
    masked = torch.tensor([[1, 4, 41, *[0] * 47]])  # RecBole drops the oldest column to make room for the mask
    close(cf.user_states([1], [[3, 1, 4]]), cf.model(masked)[:, 2])


@torch.no_grad()
def test_users_and_items_of_models_without_histories_are_their_tables(make: Make) -> None:
    bpr, neumf, lightgcn = map(make, GENERAL)
    users, histories = [5, 2, 5], [[1, 2], [], [3]]
    close(bpr.user_states(users, histories), bpr.model.user_embedding.weight[users])
    close(bpr.item_table, bpr.model.item_embedding.weight)
    model = neumf.model
    both = torch.cat([model.user_mf_embedding.weight, model.user_mlp_embedding.weight], 1)
    close(neumf.user_states(users, histories), both[users])
    close(neumf.item_table, torch.cat([model.item_mf_embedding.weight, model.item_mlp_embedding.weight], 1))
    people, things = lightgcn.model()  # after the graph, not the tables
    close(lightgcn.user_states(users, histories), people[users])
    close(lightgcn.item_table, things)
    assert not torch.allclose(things, lightgcn.model.item_embedding.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_user_without_history_has_a_state_of_zeros_and_disturbs_nobody(make: Make, name: str) -> None:
    cf = make(name)
    states = cf.user_states([1, 2, 3], [[3, 1], [], [4]])
    assert torch.isfinite(states).all() and not states[1].any() and states[[0, 2]].abs().sum(1).min() > 0
    close(states[[0, 2]], cf.user_states([1, 3], [[3, 1], [4]]))


@torch.no_grad()
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_of_a_long_history_the_last_items_are_read(make: Make, name: str) -> None:
    cf, recent = make(name, MAX_ITEM_LIST_LENGTH=5), [7, 8, 9, 10, 11]
    states = cf.user_states([1, 1, 1], [[1, 2, 3, *recent], recent, recent[1:]])
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2])


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_candidate_scores_are_the_models_own(make: Make, name: str) -> None:
    cf = make(name)
    interaction, users, histories = asked(cf)
    candidates = torch.randint(1, 41, (len(users), 6), generator=torch.Generator().manual_seed(0))
    found = cf.candidate_scores(users, histories, candidates)
    if name == "NeuMF":  # it has no full ranking
        own = torch.stack(
            [cf.model.predict(Interaction({"user_id": interaction["user_id"], "item_id": column})) for column in candidates.T],
            dim=1,
        )
    else:
        own = cf.model.full_sort_predict(interaction).view(len(users), -1).gather(1, candidates)
    assert found.shape == candidates.shape and found.std() > 0
    close(found, own)


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_the_catalogue_is_ranked_for_another_models_interaction_of_longer_histories(make: Make, name: str) -> None:
    short, (interaction, users, histories) = make(name, MAX_ITEM_LIST_LENGTH=5), asked(make("SASRec"))
    assert interaction["item_id_list"].shape[1] == 50 and max(map(len, histories)) > 5
    scores = short.scores(interaction)  # [B, I]
    assert scores.shape == (len(users), 41)
    everything = torch.arange(41).expand(len(users), -1)
    close(scores, short.candidate_scores(users, [history[-5:] for history in histories], everything))


@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_in_another_process_it_answers_as_where_it_was_trained(make: Make, module_settings: dict[str, Any], name: str) -> None:
    trained = make(name)
    interaction, users, histories = asked(trained)
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), name, SMALL)
    again.load(trained.folder)  # type: ignore[attr-defined]
    assert torch.equal(again.user_states(users, histories), trained.user_states(users, histories))
    assert torch.equal(again.item_table, trained.item_table)
    assert torch.equal(again.scores(interaction), trained.scores(interaction))


# -- states at every item ----------------------------------------------------------------------------------------------

SEEN = [[3, 1, 4, 15, 9], [7], [], [2, 6]]
BY_PREFIX = ["STAMP", "LightSANs"]  # LightSANs mixes all columns: it is read at its full length or not at all
AS_RECBOLE = {"train_mode": "prefix"}  # its NextItNet reads the padding


@pytest.mark.parametrize(
    ("name", "values"), [(name, {}) for name in ["SASRec", "GRU4Rec", "NextItNet", *BY_PREFIX]] + [("NextItNet", AS_RECBOLE)]
)
def test_the_state_at_an_item_is_the_user_state_after_it(
    make: Make, name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collaborative, "PREFIXES", 3)
    cf = make(name, **values)
    states, known = cf.sequence_states(SEEN)  # [B, N, H], [B, N]
    assert known.tolist() == [[place < len(history) for place in range(5)] for history in SEEN]
    assert states.shape == (4, 5, cf.state_width) and not states[~known].any() and not states.requires_grad
    prefixes = [history[: end + 1] for history in SEEN for end in range(len(history))]
    close(states[known], cf.user_states([1] * len(prefixes), prefixes))
    assert len({*map(tuple, states[known].tolist())}) == len(prefixes)


@torch.no_grad()
def test_bert4rec_sees_the_whole_history_from_each_of_its_items(make: Make) -> None:
    cf = make("BERT4Rec")
    states, known = cf.sequence_states(SEEN)
    assert known.sum(1).tolist() == [5, 1, 0, 2] and not states[~known].any() and cf.state_width == 16
    for row, history in zip(states, SEEN, strict=True):
        padded = torch.tensor([[*history, *[0] * (50 - len(history))]])
        close(row[: len(history)], cf.model(padded)[0, : len(history)])
    shorter, _ = cf.sequence_states([SEEN[0][:4]])
    assert not torch.allclose(states[0, :4], shorter[0], atol=1e-3)


@pytest.mark.parametrize("name", GENERAL)
def test_without_a_history_of_its_own_a_model_has_the_items_vectors_there(make: Make, name: str) -> None:
    cf, long = make(name, MAX_ITEM_LIST_LENGTH=4), [3, 1, 4, 15, 9]
    states, known = cf.sequence_states([long, [], [7]])
    close(states[0], cf.item_table[long])
    close(states[2, 0], cf.item_table[7])
    assert known.sum(1).tolist() == [5, 0, 1] and not states[~known].any()
    assert cf.state_width == states.shape[-1] == cf.item_table.shape[1]


@pytest.mark.parametrize("name", [*SEQUENTIAL, *BY_PREFIX, "BPR"])
def test_a_row_of_states_is_the_same_in_any_company(make: Make, name: str) -> None:
    cf = make(name)
    states, _ = cf.sequence_states([*SEEN, list(range(1, 41))])
    for row, history in zip(states, SEEN, strict=False):
        alone, known = cf.sequence_states([np.array(history, dtype=int)])  # an empty one has one column of padding
        assert alone.shape == (1, max(len(history), 1), cf.state_width) and known.sum() == len(history)
        close(alone[0, : len(history)], row[: len(history)])
    nothing, known = cf.sequence_states([[], []])
    assert nothing.shape == (2, 1, cf.state_width) and not nothing.any() and not known.any()


@pytest.mark.parametrize("name", [*SEQUENTIAL, *BY_PREFIX])
def test_of_a_long_history_the_states_are_those_of_its_last_items(make: Make, name: str) -> None:
    cf, recent = make(name, MAX_ITEM_LIST_LENGTH=5), [7, 8, 9, 10, 11]
    states, known = cf.sequence_states([[1, 2, 3, *recent], recent, recent[1:]])
    assert states.shape[1] == 5 and known.sum(1).tolist() == [5, 5, 4]
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0, 1:], states[2, :4])


@pytest.mark.parametrize(("name", "read"), [*((name, [(4, 5)]) for name in SEQUENTIAL), ("STAMP", [(9, 50)])])
def test_one_pass_over_no_more_than_the_longest_history_where_that_is_enough(
    make: Make, name: str, read: list[tuple[int, ...]]
) -> None:
    cf, passes = make(name), []
    hook = cf.model.item_embedding.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    cf.sequence_states(SEEN)
    hook.remove()
    assert passes == read


def test_the_items_are_those_of_the_weights_that_were_loaded(make: Make, module_settings: dict[str, Any]) -> None:
    trained = make("LightGCN")
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), "LightGCN", SMALL)
    assert not torch.allclose(again.item_table, trained.item_table)  # asked before its stage is there
    again.load(trained.folder)  # type: ignore[attr-defined]
    assert torch.equal(again.item_table, trained.item_table)
    assert torch.equal(again.sequence_states([[3]])[0], trained.sequence_states([[3]])[0])


# -- which models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Pop", "ItemKNN"])
def test_a_model_without_vectors_is_refused_by_name(module_settings: dict[str, Any], name: str) -> None:
    cf = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), name, SMALL)
    for ask in (lambda: cf.item_table, lambda: cf.user_states([1], [[2]]), lambda: cf.sequence_states([[2]])):
        with pytest.raises(ValueError, match=f"cf_model: {name} has no vectors .* choose SASRec, .*collaborative.py"):
            ask()


@pytest.mark.parametrize(("name", "reads"), [("Caser", "user, item_seq"), ("HGN", "seq_item, user"), ("CORE", "item_seq")])
def test_a_model_whose_forward_reads_more_or_less_is_refused_and_not_misread(
    module_settings: dict[str, Any], name: str, reads: str
) -> None:
    cf = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), name, SMALL)
    for ask in (lambda: cf.user_states([1], [[2]]), lambda: cf.sequence_states([[2], []]), lambda: cf.state_width):
        with pytest.raises(ValueError, match=f"cf_model: {name} reads {reads}, not a history alone; choose SASRec"):
            ask()


# -- its stage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec", "NeuMF"])
def test_what_is_trained_does_not_depend_on_what_was_drawn_before(
    make: Make, module_settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    first = make(name)
    torch.manual_seed(99)
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), name, SMALL)
    fresh = {key: tensor.clone() for key, tensor in again.model.state_dict().items()}
    again.load(StageCache(tmp_path).run(again.stage))
    assert again.stage.fingerprint == first.stage.fingerprint
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
    assert any(not torch.equal(again.model.state_dict()[key], tensor) for key, tensor in fresh.items())


@pytest.mark.parametrize("name", ["SASRec", "NeuMF"])
def test_it_is_frozen_and_deterministic(make: Make, name: str) -> None:
    cf = make(name)
    assert not any(parameter.requires_grad for parameter in cf.model.parameters())
    assert not any(module.training for module in cf.model.modules())
    _, users, histories = asked(cf)
    states = cf.user_states(users, histories)
    assert torch.equal(cf.user_states(users, histories), states) and not states.requires_grad
    assert not cf.item_table.requires_grad


def test_only_what_recbole_reads_trains_it_anew(module_settings: dict[str, Any]) -> None:
    def fingerprint(values: dict[str, Any], **changes: Any) -> str:
        config = LLMConfig("ALLMRec", "tiny", config_dict={**module_settings, **changes})
        return CollaborativeModel(config, "SASRec", {**SMALL, **values}).stage.fingerprint

    result = {"hidden_size": 8}, {"epochs": 2}, {"learning_rate": 0.02}, {"MAX_ITEM_LIST_LENGTH": 9}
    found = [fingerprint(values) for values in ({}, *result)] + [fingerprint({}, seed=1)]
    found.append(fingerprint({}, mask_history=False))  # it is validated under a full ranking
    assert len(set(found)) == len(found)
    ours = {"alpha": 0.1, "epochs": 7, "eval_batch_size": 9, "max_history": 3, "noun": "film", "checkpoint_dir": "elsewhere"}
    assert fingerprint({}, **ours) == found[0]


def test_a_retriever_of_the_same_settings_is_the_same_model_trained_once(module_settings: dict[str, Any], tmp_path: Path) -> None:
    config = LLMConfig("ALLMRec", "tiny", config_dict={**module_settings, "retriever_config": SMALL})
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


# -- checkpoints -------------------------------------------------------------------------------------------------------


NUMBERS = itertools.count()


@pytest.fixture
def plain(module_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Any]]:
    """Train a model with nothing but RecBole; returns the file that it saved and the model."""

    def plain(name: str, dataset_path: Any = None, **values: Any) -> tuple[str, Any]:
        monkeypatch.setattr(sys, "argv", ["recbole"])
        settings = {
            "data_path": str(dataset_path or module_settings["data_path"]),
            "checkpoint_dir": "saved",
            "show_progress": False,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "epochs": 1,
            "train_batch_size": 64,
            "seed": 3,
            "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
            **values,
        }
        if name != "BPR":
            settings["train_neg_sample_args"] = None
        config = Config(name, "tiny", config_dict=settings)
        init_seed(3, True)
        data = create_dataset(config)
        train, valid, _ = data_preparation(config, data)
        model = get_model(name)(config, train._dataset)
        trainer = Trainer(config, model)
        trainer.fit(train, valid, show_progress=False)
        file = Path(trainer.saved_model_file)  # RecBole's names have a resolution of one second, at which tests collide
        return str(file.rename(file.with_stem(f"{file.stem}-{next(NUMBERS)}"))), model.eval()

    return plain


PLAIN = {
    "SASRec": {"hidden_size": 24, "inner_size": 20, "n_heads": 3, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 7},
    "BPR": {"embedding_size": 24},
    "NextItNet": {"embedding_size": 8, "block_num": 1, "MAX_ITEM_LIST_LENGTH": 20},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_file_of_plain_recbole_gives_its_model_with_sizes_read_from_it(make: Make, plain: Any, name: str) -> None:
    file, model = plain(name, **PLAIN[name])
    cf = make(name, checkpoint=file, values={})
    interaction, users, histories = asked(cf)
    if name != "BPR":
        assert interaction["item_id_list"].shape[1] == PLAIN[name]["MAX_ITEM_LIST_LENGTH"]
    with torch.no_grad():
        own = model.full_sort_predict(interaction).view(len(users), -1)
    assert own.std() > 0
    close(cf.scores(interaction), own)
    close(cf.user_states(users, histories) @ cf.item_table.T, own)  # NextItNet's as RecBole reads it, too


def test_a_file_of_our_own_trainer_is_read_as_it_was_trained(make: Make, settings: dict[str, Any], assemble: Any) -> None:
    made = assemble("NextItNet", {**settings, **SMALL})  # on whole sequences
    made.trainer.fit(made.train, made.valid, show_progress=False)
    made.trainer.load_best()
    made.model.eval()
    cf = make("NextItNet", checkpoint=made.trainer.saved_model_file, values={})
    interaction, users, histories = asked(cf)
    with torch.no_grad():
        close(cf.user_states(users, histories), made.model(interaction["item_id_list"]))


def test_a_file_in_the_home_folder_and_one_in_safetensors_will_do(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make("BPR")
    save_file(trained.model.state_dict(), tmp_path / "bpr.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(make("BPR", checkpoint="~/bpr.safetensors", values=SMALL).item_table, trained.item_table)


def test_a_file_of_another_catalogue_or_size_is_refused_by_name(make: Make, plain: Any, tmp_path: Path) -> None:
    file, _ = plain("BPR", embedding_size=8)
    with pytest.raises(ValueError, match=f"cf_checkpoint: .*{Path(file).name} does not fit BPR on tiny .*size mismatch"):
        make("BPR", checkpoint=file, values={"embedding_size": 16})
    with pytest.raises(ValueError, match=r"does not fit SASRec on tiny \(Missing key.*Give the dataset .*--cf_model"):
        make("SASRec", checkpoint=file, values={})
    smaller, _ = plain("BPR", dataset_path=write_dataset(tmp_path / "smaller", items=30), embedding_size=8)
    with pytest.raises(ValueError, match=f"cf_checkpoint: .*{Path(smaller).name} does not fit BPR on tiny .*embedding"):
        make("BPR", checkpoint=smaller, values={})


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_a_malicious_file_is_refused_unexecuted(make: Make) -> None:
    torch.save({"state_dict": {"item_embedding.weight": Trap()}}, "trap.pth")
    with pytest.raises(ValueError, match="cf_checkpoint: trap.pth is refused: state_dict.*is no ordinary tensor"):
        make("BPR", checkpoint="trap.pth", values={})
    assert not Path("executed").exists()
    torch.load("trap.pth", weights_only=False)
    assert Path("executed").exists()  # the trap works


def test_another_file_is_another_stage_and_a_copy_is_not(make: Make, module_settings: dict[str, Any]) -> None:
    state = {name: tensor.clone() for name, tensor in make("BPR").model.state_dict().items()}

    def fingerprint(file: str) -> str:
        save_file(state, file)
        return CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=module_settings), "BPR", SMALL, file).stage.fingerprint

    first, copy = fingerprint("one.safetensors"), fingerprint("copy.safetensors")
    next(iter(state.values()))[1, 0] += 1e-3
    assert first == copy != fingerprint("changed.safetensors")
    assert make("BPR").stage.fingerprint != first  # trained, not taken over
