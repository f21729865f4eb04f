"""The matrix of models and forms of data: every cell runs, or is refused with its key before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_dataset

from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.stages import StageCache
from tests.contract.forms import FORMS, LOSS, THREE, files, inter, write

# -- the matrix: "" runs; any other text is the beginning of the error ----------------------------------------------------------

MODELS = ["Pop", "BPR", "AlphaRec", "SASRec", "Laser", "TALLRec"]
FILES, ARGS = "benchmark_filename: ", "eval_args: "
TIME = "eval_args: order RO is random"


def row(
    general: str = "", sequential: str = "", encoder: str = "", ranker: str = "", merging: str | None = None
) -> dict[str, str]:
    """Cells by model; that of a ranker which merges, where it is told, since most are those of a ranker."""
    cells = dict(zip(MODELS, (general, general, general, sequential, encoder, ranker), strict=True))
    return cells if merging is None else cells | {"LoRACocktail": merging}


def refused(text: str) -> dict[str, str]:
    return dict.fromkeys(MODELS, text)


MATRIX = {
    "three files": row(merging=""),
    "three files without times": row(),
    "three files with lists": row(),
    "three files, full ranking": row(ranker=FILES),
    "three files, several targets": refused(FILES),
    "three files, several targets, full ranking": row(ranker=FILES),
    "three files, several targets, full ranking, by loss": row(merging=FILES),
    "three files, filtered": refused("user_inter_num_interval: "),
    "two files": row(ranker=FILES),
    "two files, by loss": row(merging=FILES),
    "one name": refused(FILES),
    "test only": row(ranker=ARGS),
    "valid only": refused(ARGS),
    "leave one out, random": row("", TIME, TIME, TIME),
    "leave one out, not grouped": refused("eval_args: group_by"),
    "ratio": row(ranker=ARGS),
    "ratio, candidates": refused(ARGS),
    "ratio, not grouped": row(ranker=ARGS),
    "ratio, random": row("", TIME, TIME, TIME),
    "ratio without validation": row(ranker=ARGS),
    "two ratios": refused("eval_args: split {'RS': [0.8, 0.2]} needs three shares"),
    "time": row(ranker=ARGS),
    "uni9": row(ranker="eval_args: mode 'uni9'"),
    "pop9": row(ranker="eval_args: mode 'pop9'"),
    "uni9 of a ratio": row(ranker="eval_args: mode 'uni9'"),
    "uni": refused("eval_args"),
    "filtered users": row(),
    "filtered values": row(),
    "filtered values without the column": refused("val_interval: there is no column 'rating'"),
    "threshold without the column": refused("threshold: there is no column 'rating'"),
    "separator": row(),
    "renamed": row(),
    "without times": refused("TIME_FIELD: timestamp is not loaded"),
    "without times, random": row("", TIME, TIME, TIME),
    "labels in a ranking": refused("metrics: AUC"),
    "labels and ranks": refused("metrics: Hit measures rankings, RMSE click labels"),
    "ranks of labels": row(*["metrics: Hit in config_dict measures rankings"] * 3, "eval_args: mode 'labeled'"),
}

FAST = ("Pop", "SASRec")  # the models of the fast set, and what TALLRec refuses
CELLS = [
    pytest.param(
        form, model, marks=[] if model in FAST or (text and model == "TALLRec") else pytest.mark.slow, id=f"{form}-{model}"
    )
    for form, cells in MATRIX.items()
    for model, text in cells.items()
]


SHORT = {  # whether a form runs needs no more training
    **{key: 1 for key in ("lora_epochs", "general_epochs", "phase1_epochs", "merge_steps")},
    **{"train_samples": 8, "general_samples": 8, "valid_users": 4, "merge_prompts": 2, "merge_points": 2, "phase2_epochs": 0},
}


@pytest.fixture(scope="module")
def of_form(module_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The settings of a form, with its files."""
    made: dict[str, Path] = {}

    def settings(form: str) -> dict[str, Any]:
        change, changes = FORMS[form]
        if form not in made:
            made[form] = write_dataset(tmp_path_factory.mktemp("form"))
            change(made[form] / "tiny")
        arguments = module_settings["eval_args"] | changes.get("eval_args", {})
        own = {"data_path": str(made[form]), "checkpoint_dir": str(made[form] / "saved"), "eval_args": arguments}
        return module_settings | SHORT | changes | own

    return settings


@pytest.mark.parametrize(("form", "model"), CELLS)
def test_a_model_runs_on_a_form_or_refuses_it_by_its_key(
    form: str, model: str, of_form: Any, assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, settings = MATRIX[form][model], of_form(form)
    if not text:
        found = run_recbole_llm(model, "tiny", config_dict=settings)
        assert found["test_result"] and all(np.isfinite(value) for value in found["test_result"].values())
        return

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("something is trained before the refusal")

    monkeypatch.setattr(ProtocolTrainer, "fit", forbidden)
    monkeypatch.setattr(StageCache, "_run", forbidden)
    with pytest.raises(ValueError) as caught:
        assemble(model, settings)
    assert str(caught.value).startswith(text), str(caught.value)


# -- what the forms are ---------------------------------------------------------------------------------------------------------


def sets(run: Any) -> dict[str, list[tuple[str, str]]]:
    """The rows of each split as (user, item) tokens, in their order."""
    tokens = [run.train._dataset.field2id_token[field] for field in (run.train._dataset.uid_field, run.train._dataset.iid_field)]
    found = {}
    for name, loader in (("train", run.train), ("valid", run.valid), ("test", run.test)):
        data = loader._dataset
        pairs = zip(data.inter_feat[data.uid_field].tolist(), data.inter_feat[data.iid_field].tolist(), strict=True)
        found[name] = [(str(tokens[0][user]), str(tokens[1][item])) for user, item in pairs]
    return found


@pytest.mark.parametrize("form", ["three files", "three files without times", "three files with lists"])
def test_files_that_leave_one_out_are_the_same_as_one_file(
    form: str, of_form: Any, assemble: Any, module_settings: dict[str, Any]
) -> None:
    """Candidates, histories and rows, by token."""
    whole, split = assemble("SASRec", module_settings), assemble("SASRec", of_form(form))
    for phase in ("valid", "test"):
        assert split.candidates[phase].sha256 == whole.candidates[phase].sha256
    assert {name: sorted(rows) for name, rows in sets(split).items()} == {
        name: sorted(rows) for name, rows in sets(whole).items()
    }
    one, other = (run.train._dataset.histories for run in (whole, split))
    for user, token in enumerate(one.user_ids[1:], start=1):
        place = other.user_ids.index(token)
        for read in ("train", "before"):
            phase = () if read == "train" else ("test",)
            mine, its = (getattr(h, read)(u, *phase).tolist() for h, u in ((one, user), (other, place)))
            assert [one.item_ids[item] for item in mine] == [other.item_ids[item] for item in its]


RECBOLES = [
    "test only",
    "leave one out, random",
    "ratio",
    "ratio, not grouped",
    "ratio, random",
    "ratio without validation",
    "time",
]


@pytest.mark.parametrize("form", RECBOLES)
def test_a_general_model_has_the_split_of_recbole(form: str, tmp_path: Path, of_form: Any, assemble: Any) -> None:
    """The same rows in the same order, but for evaluation rows of users without earlier rows."""
    from recbole.data.dataset import Dataset
    from recbole.utils import init_seed

    folder = write_dataset(tmp_path) / "tiny"
    header, rows = inter(folder)
    write(folder, "", header, [[user, item, str(int(time) - 10**9)] for user, item, time in rows])  # exact in RecBole's float32
    settings = of_form(form) | {"data_path": str(tmp_path), "rm_dup_inter": None}  # of which RecBole's sorts the rows
    config = LLMConfig("BPR", "tiny", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    theirs = Dataset(config).build()
    mine, known = sets(assemble("BPR", settings)), set()
    for name, part in zip(mine, theirs, strict=True):
        tokens = [part.field2id_token[field] for field in (part.uid_field, part.iid_field)]
        pairs = zip(part.inter_feat[part.uid_field].tolist(), part.inter_feat[part.iid_field].tolist(), strict=True)
        every = [(str(tokens[0][user]), str(tokens[1][item])) for user, item in pairs]
        expected = [pair for pair in every if name == "train" or pair[0] in known]
        key = (lambda pair: pair) if name == "train" else (lambda pair: pair[0])  # loaders sort evaluation rows by user
        assert sorted(mine[name], key=key) == sorted(expected, key=key)
        known |= {user for user, _ in every}


@pytest.mark.parametrize("form", ["test only", "ratio", "ratio, not grouped", "ratio without validation", "time", "two files"])
def test_sequential_and_general_models_have_the_same_targets(form: str, of_form: Any, assemble: Any) -> None:
    settings = of_form(form) | {"eval_args": of_form(form)["eval_args"] | {"mode": "full"}}
    general, sequential = (sets(assemble(model, settings)) for model in ("Pop", "SASRec"))
    for phase in ("valid", "test"):
        assert sorted(general[phase]) == sorted(sequential[phase])
    assert set(sequential["train"]) <= set(general["train"])
    assert len(general["train"]) - len(sequential["train"]) == len({user for user, _ in general["train"]})  # first interactions


def test_no_history_holds_an_item_of_a_later_file(tmp_path: Path, module_settings: dict[str, Any], assemble: Any) -> None:
    """Also where the items of the later files are the earliest ones in time."""
    files(1, 1, first=True)(write_dataset(tmp_path) / "tiny")
    run = assemble("SASRec", module_settings | THREE | {"data_path": str(tmp_path)})
    held_out, train = {}, run.train._dataset
    for loader in (run.valid, run.test):
        data = loader._dataset
        for user, item in zip(data.inter_feat["user_id"].tolist(), data.inter_feat["item_id"].tolist(), strict=True):
            held_out.setdefault(user, []).append(item)
    for user, lists in zip(train.inter_feat["user_id"].tolist(), train.inter_feat["item_id_list"].tolist(), strict=True):
        assert not {*held_out[user]} & {*lists}
    for user, (valid, test) in held_out.items():
        histories = train.histories
        assert (histories.target(user, "valid"), histories.target(user, "test")) == (valid, test)
        assert not {valid, test} & {*histories.train(user).tolist()} and histories.before(user, "test")[-1] == valid


@pytest.mark.parametrize("times", [True, False])
def test_files_without_a_time_field_are_in_their_own_order(
    times: bool, tmp_path: Path, module_settings: dict[str, Any], assemble: Any
) -> None:
    files(1, 1, times=times)(write_dataset(tmp_path) / "tiny")
    settings = module_settings | THREE | {"data_path": str(tmp_path), "load_col": None}
    named, unnamed = (assemble("SASRec", settings | given) for given in ({}, {"TIME_FIELD": None}))
    for one, other in ((named.train, unnamed.train), (named.valid, unnamed.valid), (named.test, unnamed.test)):
        for column in ("user_id", "item_id_list", "item_id"):
            assert one._dataset.inter_feat[column].equal(other._dataset.inter_feat[column])
    unnamed.trainer.fit(unnamed.train, unnamed.valid)


def test_without_validation_a_training_runs_to_its_last_epoch(of_form: Any, assemble: Any, caplog: Any) -> None:
    run = assemble("BPR", of_form("two files") | {"epochs": 3, "stopping_step": 1})
    assert "benchmark_filename: ['train', 'test']: no validation data, so a training ends with its last epoch" in caplog.text
    score, result = run.trainer.fit(run.train, run.valid)
    assert result is None and len(run.trainer.train_loss_dict) == 3 and not len(run.valid._dataset)
    assert set(run.candidates) == {"test"}


def test_users_without_earlier_rows_are_not_evaluated_in_any_model(
    tmp_path: Path, module_settings: dict[str, Any], assemble: Any, caplog: Any
) -> None:
    folder = write_dataset(tmp_path) / "tiny"
    files(1, 1)(folder)
    with (folder / "tiny.test.inter").open("a") as file:
        file.write("new\ti1\t1000009999\n")
    settings = module_settings | THREE | {"data_path": str(tmp_path), "eval_args": {"mode": "full"}}
    for model in ("Pop", "SASRec"):
        assert len(sets(assemble(model, settings))["test"]) == 60
    assert "1 test interactions of users without earlier ones are left out" in caplog.text


@pytest.mark.parametrize("model", ["Laser", "TALLRec"])
def test_models_inside_a_run_have_its_split(model: str, of_form: Any, assemble: Any) -> None:
    """The collaborative model and the retriever must not be trained on test items."""
    settings = of_form("three files, several targets, full ranking, by loss")
    for form in ({}, {"benchmark_filename": None, "eval_args": {"split": {"RS": [0.5, 0.2, 0.3]}, "mode": "full"}}):
        if form:
            settings = of_form("ratio") | LOSS | form
        made = assemble(model, settings).model
        inner = made.cf if model == "Laser" else made.retriever
        assert inner.histories.fingerprint == made.parts.histories.fingerprint
        assert made.parts.domain.histories[0].tolist() == made.parts.histories.train(1).tolist()


def test_early_stopping_of_an_encoder_reads_the_training_history_alone(of_form: Any, assemble: Any) -> None:
    histories = assemble("Laser", of_form("ratio")).model.parts.histories
    for user in histories.evaluated("valid").tolist():
        assert len(histories.before(user, "valid")) + histories.held_out[user].sum() == len(histories.items[user])


def test_the_record_says_how_several_targets_are_ranked(of_form: Any) -> None:
    how = {}
    for model in ("Pop", "SASRec"):
        record = json.loads(Path(run_recbole_llm(model, "tiny", config_dict=of_form("ratio"))["record"]).read_text())
        how[model] = record["protocol"]["targets"]
        assert record["ranks"] == {model: {}} and record["half_width_95"] == {model: {}}
    assert how == {"Pop": "together", "SASRec": "one by one"}


def test_drawn_negatives_are_said_to_differ(of_form: Any, caplog: Any) -> None:
    run_recbole_llm("Pop", "tiny", config_dict=of_form("uni9"))
    assert "mode uni9 (negatives drawn anew in every evaluation: not comparable between runs)" in caplog.text


# -- lists of histories in files that are split already -------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path, module_settings: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = write_dataset(tmp_path / "data") / "tiny"
    files(1, 1, lists=True)(folder)
    yield folder, module_settings | THREE | {"data_path": str(folder.parent), "checkpoint_dir": str(tmp_path / "saved")}


def test_items_of_lists_have_the_ids_of_items(listed: tuple[Path, dict[str, Any]]) -> None:
    folder, settings = listed
    data = create_dataset(LLMConfig("SASRec", "tiny", config_dict=settings))
    assert data.num("item_id_list") == data.item_num == 41


def test_lists_that_do_not_continue_are_refused(listed: tuple[Path, dict[str, Any]], assemble: Any) -> None:
    folder, settings = listed
    file = folder / "tiny.test.inter"
    header, first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([header, f"{first} i39 i39", *rest]) + "\n")
    with pytest.raises(
        ValueError, match=r"benchmark_filename: an entry of item_id_list of user u0 does not end with the item of the row"
    ):
        assemble("SASRec", settings)


def test_lists_beyond_the_longest_history_are_refused(listed: tuple[Path, dict[str, Any]], assemble: Any) -> None:
    with pytest.raises(ValueError, match=r"MAX_ITEM_LIST_LENGTH: 5 is less than the 12 items .* give --MAX_ITEM_LIST_LENGTH=12"):
        assemble("SASRec", listed[1] | {"MAX_ITEM_LIST_LENGTH": 5})
