"""The columns that settings name: a setting does what it says, or is refused with key, column and remedy before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import write_dataset

from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset
from recbole_llm.quick_start import assemble, run_recbole_llm

ALL = {"load_col": None}
INCOME = {"numerical_features": ["income"], **ALL}
OWN = {"inter": ["user_id", "item_id", "timestamp"]}


@pytest.fixture
def own(data_path: Path, tmp_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for ``tiny`` with ratings and a file of users."""
    folder = tmp_path / "own" / "tiny"
    shutil.copytree(data_path / "tiny", folder)
    header, *lines = (folder / "tiny.inter").read_text().splitlines()
    rated = [f"{line}\t{1 + place % 5}" for place, line in enumerate(lines)]
    (folder / "tiny.inter").write_text("\n".join([f"{header}\trating:float", *rated]) + "\n")
    users = [f"u{user}\t{20 + user % 5}\t{user * 1.5}\t{'chess tea' if user % 2 else 'go'}" for user in range(60)]
    head = "user_id:token\tage:token\tincome:float\thobbies:token_seq"
    (folder / "tiny.user").write_text("\n".join([head, *users]) + "\n")
    return {**settings, "data_path": str(folder.parent)}


def table(own: dict[str, Any], suffix: str = "inter", name: str = "tiny") -> pd.DataFrame:
    """A file, read by pandas, without the types of its header."""
    frame = pd.read_csv(Path(own["data_path"]) / name / f"{name}.{suffix}", sep="\t", dtype={"age:token": str})
    return frame.rename(columns=lambda name: name.partition(":")[0])


def read(own: dict[str, Any], model: str = "BPR", **changes: Any) -> Any:
    return create_dataset(LLMConfig(model, "tiny", config_dict={**own, **changes}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an absent alias": ({"alias_of_item_id": ["x"]}, "alias_of_item_id: there is no column 'x' among those loaded"),
    "a number as alias": (
        {"alias_of_item_id": ["rating"], **ALL},
        "alias_of_item_id: rating is a column of type float, .* token",
    ),
    "an absent column to normalise": ({"normalize_field": ["x"]}, "normalize_field: there is no column 'x'"),
    "a token to normalise": ({"normalize_field": ["age"], **ALL}, "normalize_field: age is a column of type token"),
    "an absent number": ({"numerical_features": ["x"]}, "numerical_features: there is no column 'x'"),
    "the time as a feature": ({"numerical_features": ["timestamp"]}, r"numerical_features: timestamp is the time \(TIME_FIELD\)"),
    "an absent list": ({"seq_len": {"x": 3}}, "seq_len: there is no column 'x'"),
    "a text that is no list": (
        {"seq_len": {"age": 3}, **ALL},
        "seq_len: age is a column of type token, .* token_seq or float_seq",
    ),
    "parts of a column that is no feature": (
        {"discretization": {"income": {"method": "ED", "bucket": 3}}, **ALL},
        r"discretization: income is not in numerical_features: \[\]; list it there, too",
    ),
    "an unknown way to divide": (
        {"discretization": {"income": {"method": "EF", "bucket": 3}}, **INCOME},
        r"discretization: income: \{'method': 'EF', 'bucket': 3\} must be \{'method': 'ED', 'bucket': 10\}",
    ),
    "parts without a number": ({"discretization": {"income": {"method": "ED"}}, **INCOME}, "discretization: income: .* must be"),
    "an absent weight": ({"preload_weight": {"user_id": "x"}, **ALL}, r"preload_weight: Preload value field \[x\] not exist"),
    "an absent file": ({"additional_feat_suffix": ["emb"]}, "additional_feat_suffix: 'emb': there is no file .*tiny.emb"),
    "a file that is read anyway": (
        {"additional_feat_suffix": ["user"]},
        "additional_feat_suffix: 'user': RecBole reads .user any",
    ),
    "no threshold": ({"threshold": {}}, "threshold: {} must name one column, such as {'rating': 4}"),
    "two thresholds": ({"threshold": {"rating": 3, "timestamp": 4}}, "threshold: .* must name one column"),
    "a threshold of ids": (
        {"threshold": {"user_id": 3}},
        "threshold: user_id is a column of type token, and this key is for float",
    ),
    "a threshold of times": ({"threshold": {"timestamp": 3}}, r"threshold: timestamp is the time \(TIME_FIELD\)"),
    "a threshold of users": ({"threshold": {"income": 3}, **ALL}, "threshold: income is not a column of .inter"),
    "a list of numbers": (
        {"val_interval": {"rating": [3, 4, 5]}},
        r"val_interval: rating is a column of type float, .* \[3, 4, 5\]",
    ),
    "an interval of tokens": (
        {"val_interval": {"age": "[20,22]"}, **ALL},
        "val_interval: age is a column of type token, .*'A', 'B'",
    ),
    "numbers for tokens": ({"val_interval": {"age": [20, 22]}, **ALL}, r"val_interval: age .*, not 20; give \['20', '22'\]"),
    "values of a list": ({"val_interval": {"hobbies": ["go"]}, **ALL}, "val_interval: hobbies is a column of type token_seq"),
    "a column that is not loaded": (
        {"val_interval": {"age": ["20"]}},
        r"val_interval: there is no column 'age' .* it is in tiny.user: give load_col: .*'user': \['user_id', 'age'\]",
    ),
    "an absent unused column": ({"unused_col": {"inter": ["x"]}}, "unused_col: .inter has no column 'x' that is loaded"),
    "an unused id": ({"unused_col": {"inter": ["user_id"]}}, r"unused_col: user_id \(USER_ID_FIELD\) is needed by every model"),
    "an unused column of a file that is not loaded": ({"unused_col": {"user": ["age"]}}, "unused_col: .user has no column 'age'"),
    "a file of another name": ({"unused_col": {"users": ["age"]}}, "unused_col: 'users' is none of the files inter, user, item"),
    "an absent column": (
        {"load_col": {"inter": [*OWN["inter"], "stars"]}},
        "load_col: there is no column 'stars' in .*tiny.inter",
    ),
    "no ids": ({"load_col": {"inter": ["item_id", "timestamp"]}}, r"load_col: user_id \(USER_ID_FIELD\) of .* must be loaded"),
    "no ids of users": (
        {"load_col": {**OWN, "user": ["age"]}},
        r"load_col: user_id \(USER_ID_FIELD\) of .*tiny.user must be loaded",
    ),
    "no columns": ({"load_col": {"inter": []}}, r"load_col: \{'inter': \[\]\} has no columns of the .inter file"),
    "columns of an unknown file": ({"load_col": {**OWN, "users": ["age"]}}, "load_col: 'users' is none of the files"),
    "an absent column to leave out": ({"unload_col": {"inter": ["stars"]}}, "unload_col: there is no column 'stars'"),
    "an id to leave out": (
        {"unload_col": {"inter": ["user_id"]}},
        r"load_col: user_id \(USER_ID_FIELD\) .* take it out of unload_col",
    ),
    "a feature that a model reads": ({"model": "SASRecF"}, "selected_features: there is no column 'class' among those loaded"),
    "one column for two ids": ({"ITEM_ID_FIELD": "user_id"}, "ITEM_ID_FIELD: user_id is the column of USER_ID_FIELD, too"),
    "no suffix": ({"LIST_SUFFIX": ""}, "LIST_SUFFIX: '' gives two columns of a batch one name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, own: dict[str, Any]) -> None:
    changes, message = REFUSED[case]
    changes = {"model": "BPR", **changes}
    with pytest.raises(ValueError, match=message):
        read(own, **changes)


def test_a_column_with_the_name_of_another_files_is_refused(own: dict[str, Any]) -> None:
    """RecBole would order the interactions by the column of the items."""
    file = Path(own["data_path"]) / "tiny" / "tiny.item"
    header, *lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{header}\ttimestamp:float", *(f"{line}\t{place}" for place, line in enumerate(lines))]) + "\n")
    with pytest.raises(ValueError, match="tiny.item: its column timestamp has the name of a column of .inter"):
        read(own, **ALL)
    assert read(own).inter_num == len(table(own))


@pytest.mark.parametrize(
    ("kept", "keeps"),
    [
        ({"rating": "[3,4]"}, lambda rows: rows.rating.between(3, 4)),
        ({"rating": [3, 4]}, lambda rows: rows.rating.between(3, 4)),  # how a command line reads [3,4]
        ({"rating": "[1,1];(4,inf)"}, lambda rows: (rows.rating == 1) | (rows.rating > 4)),
        ({"age": ["20", "22"]}, lambda rows: rows.age.isin(["20", "22"])),
        ({"income": "[30,inf)", "rating": "(1,inf)"}, lambda rows: (rows.income >= 30) & (rows.rating > 1)),
    ],
)
def test_values_are_kept_as_pandas_keeps_them(own: dict[str, Any], kept: dict[str, Any], keeps: Callable[..., Any]) -> None:
    rows = table(own).merge(table(own, "user"), on="user_id")
    expected = rows[keeps(rows)]
    found = read(own, val_interval=kept, rm_dup_inter=None, **ALL)
    users, items = found.tokens
    pairs = zip(found.inter_feat.user_id, found.inter_feat.item_id, strict=True)
    assert sorted((users[user], items[item]) for user, item in pairs) == sorted(
        zip(expected.user_id, expected.item_id, strict=True)
    )


def test_two_datasets_as_one_have_the_columns_that_they_share(own: dict[str, Any]) -> None:
    """``load_col`` names columns of the tested dataset; neither the other one nor both together have ratings."""
    write_dataset(Path(own["data_path"]), "other", seed=1)
    columns = {"inter": [*OWN["inter"], "rating"]}
    found = read(own, train_dataset="other", load_col=columns, val_interval={"rating": "[2,inf)"})
    kept = (table(own).rating >= 2).sum()
    assert found.inter_num == kept + len(table(own, "inter", "other"))


def test_columns_that_are_left_out_are_all_that_is_left_out(own: dict[str, Any]) -> None:
    found = read(own, unload_col={"inter": ["rating"], "user": ["age"]})
    assert {*found.inter_feat} == {"user_id", "item_id", "timestamp"} and {*found.user_feat} == {"user_id", "income", "hobbies"}


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_unused_columns_change_no_result(model: str, own: dict[str, Any]) -> None:
    results = [
        run_recbole_llm(model, "tiny", config_dict={**own, **changes})["test_result"]
        for changes in ({}, {"unused_col": {"inter": ["timestamp"], "user": ["age"]}, **ALL})
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(("model", "told"), [("BPR", True), ("NeuMF", True), ("SASRec", True), ("FM", False)])
def test_a_threshold_that_changes_nothing_is_told(model: str, told: bool, own: dict[str, Any], caplog: Any) -> None:
    labels = {"eval_args": {"mode": "labeled"}, "metrics": ["AUC"], "valid_metric": "AUC"} if model == "FM" else {}
    read(own, model, threshold={"rating": 3}, **labels)
    assert ("threshold: {'rating': 3} changes nothing: " in caplog.text) == told
    assert not told or "val_interval: {'rating': '[3,inf)'} keeps the interactions above it" in caplog.text


def test_labels_are_read_from_their_column_without_further_settings(own: dict[str, Any]) -> None:
    """RecBole's default columns leave the labels out."""
    folder = Path(own["data_path"]) / "tiny"
    header, *lines = (folder / "tiny.inter").read_text().splitlines()
    labels = [f"{line}\t{place % 3 // 2}" for place, line in enumerate(lines)]
    (folder / "tiny.inter").write_text("\n".join([f"{header}\tlabel:float", *labels]) + "\n")
    given = {**own, "eval_args": {"mode": "labeled"}, "metrics": ["AUC"], "valid_metric": "AUC"}
    data = create_dataset(LLMConfig("FM", "tiny", config_dict={**given, "train_neg_sample_args": None}))
    assert data.inter_feat.label.tolist() == [place % 3 // 2 for place in range(len(lines))]


# -- the catalogue -------------------------------------------------------------------------------------------------------------


def test_every_model_has_the_same_catalogue_whatever_files_it_loads(own: dict[str, Any]) -> None:
    """RecBole ranks an item without interactions if, and only if, a model loads the file of items."""
    folder = Path(own["data_path"]) / "tiny"
    for file, row in (("item", "extra\tNever chosen\t1999\tdrama film\n"), ("user", "nobody\t20\t0\tgo\n")):
        with (folder / f"tiny.{file}").open("a") as stream:
            stream.write(row)
    found = [assemble(LLMConfig("BPR", "tiny", config_dict={**own, **changes})) for changes in ({}, ALL)]
    plain, whole = (run.train._dataset for run in found)
    assert (plain.user_num, plain.item_num) == (whole.user_num, whole.item_num) == (61, 41)
    assert plain.histories.fingerprint == whole.histories.fingerprint
    assert found[0].candidates["test"].sha256 == found[1].candidates["test"].sha256
    genres = table(own, "item").set_index("item_id").genre
    for item, token in enumerate(whole.tokens[1][1:], start=1):
        assert " ".join(whole.id2token("genre", whole.item_feat["genre"][item]).tolist()).startswith(genres[token])


# -- what a training reads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("BPR", {"train_neg_sample_args": None}, "train_neg_sample_args: BPR compares chosen items with drawn ones"),
        (
            "NeuMF",
            {"train_neg_sample_args": None},
            r"train_neg_sample_args: NeuMF reads labels .* no column label \(LABEL_FIELD\)",
        ),
        (
            "BPR",
            {"train_neg_sample_args": {"dynamic": True}},
            "train_neg_sample_args: dynamic: True chooses one of candidate_num: 0",
        ),
        ("BPR", {"train_neg_sample_args": {"candidate_num": 3}}, "train_neg_sample_args: dynamic: False"),
        ("BPR", {"topk": [41], "valid_metric": "NDCG@41"}, "topk: 41 is more than the 40 items of tiny"),
    ],
)
def test_a_training_that_would_fail_is_refused(model: str, changes: dict[str, Any], message: str, own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(LLMConfig(model, "tiny", config_dict={**own, **changes}))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("MultiVAE", {"train_neg_sample_args": None}),
        ("NeuMF", {"train_neg_sample_args": None, "threshold": {"rating": 3}}),
        ("BPR", {"train_neg_sample_args": {"dynamic": True, "candidate_num": 3}}),
        ("BPR", {"topk": [40], "valid_metric": "NDCG@40", "eval_args": {"mode": "full"}}),
    ],
)
def test_a_training_that_reads_what_there_is_runs(model: str, changes: dict[str, Any], own: dict[str, Any]) -> None:
    assert run_recbole_llm(model, "tiny", config_dict={**own, **changes})["test_result"]
