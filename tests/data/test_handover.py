"""An exported split is exactly that of the run: read back, it has the same targets, candidates and training interactions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recbole_llm import cli
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.handover import _increasing, write_split
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.store.files import verify


def options(settings: dict[str, Any], out: Path) -> list[str]:
    return [f"--data_path={settings['data_path']}", f"--checkpoint_dir={settings['checkpoint_dir']}", f"--out={out}"]


@pytest.fixture
def split(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    own = [*options(settings, tmp_path / "split"), "--year_field=year", "--category_field=genre"]
    cli.main(["data", "export", "--dataset=tiny", "--candidates={'num_negatives': 9}", *own])
    printed = capsys.readouterr().out.split()
    assert [Path(line) for line in printed] == sorted(file for file in (tmp_path / "split").rglob("*") if file.is_file())
    verify(tmp_path / "split")
    return tmp_path / "split"


def triples(dataset: Any, split: Any) -> list[tuple[str, str]]:
    """Users and items of a RecBole split, as tokens."""
    fields = [dataset.uid_field, dataset.iid_field]
    columns = [dataset.field2id_token[field][split.inter_feat[field].numpy()] for field in fields]
    return sorted(zip(*columns, strict=True))


def rows(table: pd.DataFrame, *names: str) -> list[tuple[str, str]]:
    return sorted(zip(*(table[name] for name in names), strict=True))


def test_the_tables_are_the_splits_of_a_run(split: Path, settings: dict[str, Any]) -> None:
    config = LLMConfig("BPR", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    parts = [loader._dataset for loader in data_preparation(config, dataset)]
    for phase, part in zip(("train", "valid", "test"), parts, strict=True):
        table = pd.read_parquet(split / f"{phase}.parquet")
        assert rows(table, "user", "item") == triples(dataset, part)
        assert table["timestamp"].is_monotonic_increasing and table["timestamp"].min() >= 1_000_000_000  # as in the file
    about = json.loads((split / "split.json").read_text())
    assert about["rows"] == {phase: len(part) for phase, part in zip(("train", "valid", "test"), parts, strict=True)}
    histories = dataset.histories
    test = pd.read_parquet(split / "test.parquet").set_index("user")["item"]
    for user in histories.evaluated("test").tolist():
        assert test[histories.user_ids[user]] == histories.item_ids[histories.target(user, "test")]


def test_the_candidates_are_those_of_the_run_and_do_not_mark_the_target(split: Path, settings: dict[str, Any]) -> None:
    config = LLMConfig("BPR", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    about = json.loads((split / "split.json").read_text())
    for phase, found in candidate_sets(config, dataset).items():
        assert about["candidates_sha256"][phase] == found.sha256
        table = pd.read_parquet(split / f"candidates.{phase}.parquet")
        assert list(table.columns) == ["user", "slot", "item"]
        for user, items in zip(found.users.tolist(), found.items.tolist(), strict=True):
            own = table[table["user"] == dataset.histories.user_ids[user]].sort_values("slot")["item"]
            assert own.tolist() == [dataset.histories.item_ids[item] for item in items]


def test_the_pre_split_files_are_read_back_with_the_same_targets(split: Path, settings: dict[str, Any]) -> None:
    """By ``benchmark_filename``, and by leaving one out of the whole file; item texts and candidates are the same, too."""
    settings = {key: value for key, value in settings.items() if key not in ("year_field", "category_field")}
    original = LLMConfig("Pop", "tiny", config_dict={**settings, "year_field": "year", "category_field": "genre"})
    whole = create_dataset(original)
    expected = candidate_sets(original, whole)
    for given in ({"benchmark_filename": ["train", "valid", "test"]}, {}):
        changes = {"data_path": str(split), "checkpoint_dir": str(split.parent / f"saved{len(given)}"), **given}
        config = LLMConfig("Pop", "tiny-split", config_dict={**settings, **changes})
        dataset = create_dataset(config)
        found = candidate_sets(config, dataset)
        assert {phase: part.sha256 for phase, part in found.items()} == {phase: part.sha256 for phase, part in expected.items()}
        texts, own = dataset.item_texts, whole.item_texts
        of_token = {token: item for item, token in enumerate(dataset.histories.item_ids)}
        for item, token in enumerate(whole.histories.item_ids[1:], start=1):
            there = of_token[token]
            assert texts.titles[there] == own.titles[item] and texts.names[there] == own.names[item]
            assert texts.columns == own.columns and texts.fields["genre"][there] == own.fields["genre"][item]
        for loader, phase in zip(data_preparation(config, dataset), ("train", "valid", "test"), strict=True):
            table = pd.read_parquet(split / f"{phase}.parquet")
            assert triples(dataset, loader._dataset) == rows(table, "user", "item")


def test_rectools_gets_its_columns_in_an_order_that_its_sort_keeps(split: Path) -> None:
    tables = {name: pd.read_parquet(split / "rectools" / f"{name}.parquet") for name in ("train", "train_valid", "test")}
    for name, phases in {"train": ["train"], "train_valid": ["train", "valid"], "test": ["test"]}.items():
        table = tables[name]
        assert (
            list(table.columns) == ["user_id", "item_id", "weight", "datetime"]
            and str(table["datetime"].dtype) == "datetime64[ns]"
        )
        expected = pd.concat([pd.read_parquet(split / f"{phase}.parquet") for phase in phases])
        assert rows(table, "user_id", "item_id") == rows(expected, "user", "item")
        assert (table["datetime"].diff().dropna() > pd.Timedelta(0)).all()  # no ties
    valid = pd.read_parquet(split / "valid.parquet").set_index("user")["item"]
    last = tables["train_valid"].groupby("user_id")["item_id"].last()
    assert last[valid.index].equals(valid.rename("item_id").rename_axis("user_id"))


def test_ties_of_time_keep_the_order_of_the_split(settings: dict[str, Any], tmp_path: Path) -> None:
    """All times equal: the order of the file decides the targets, here and in what is exported."""
    folder = tmp_path / "data" / "tied"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = [f"u{user}\ti{item}\t5" for user in range(30) for item in rng.permutation(25)[:8]]
    lines = [lines[place] for place in rng.permutation(len(lines))]
    (folder / "tied.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n")
    given = {**settings, "data_path": str(tmp_path / "data"), "candidates": {"num_negatives": 5}}
    config = LLMConfig("Pop", "tied", config_dict=given)
    write_split(config, create_dataset(config), tmp_path / "split")
    test = pd.read_parquet(tmp_path / "split" / "test.parquet").set_index("user")["item"]
    last = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    assert test.to_dict() == last
    table = pd.read_parquet(tmp_path / "split" / "rectools" / "train_valid.parquet")
    assert table["datetime"].is_unique
    again = LLMConfig("SASRec", "tied-split", config_dict={**given, "data_path": str(tmp_path / "split")})
    histories = create_dataset(again).histories
    assert {histories.user_ids[user]: histories.item_ids[histories.target(user, "test")] for user in range(1, 31)} == last


def test_columns_of_texts_with_the_names_of_others_keep_their_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    """The title stands in another column, and there are a title of another kind and a column "item"."""
    shutil.copytree(settings["data_path"], tmp_path / "data")
    file = tmp_path / "data" / "tiny" / "tiny.item"
    header, *rows = file.read_text().splitlines()
    header = header.replace("title:token_seq\tyear:token\tgenre", "name:token_seq\titem:token\ttitle")
    file.write_text("\n".join([header, *rows, ""]))
    given = {key: value for key, value in settings.items() if key not in ("year_field", "category_field")}
    given |= {"data_path": str(tmp_path / "data"), "title_field": "name", "year_field": "item", "category_field": "title"}
    config = LLMConfig("Pop", "tiny", config_dict=given)
    texts = create_dataset(config).item_texts
    write_split(config, create_dataset(config), tmp_path / "split")
    table = pd.read_parquet(tmp_path / "split" / "items.parquet")
    assert table["title"].tolist() == texts.titles[1:] and table["title_text"].tolist() == texts.fields["title"][1:]
    assert table["item"].str.match(r"i\d+$").all() and table["item_text"].tolist() == texts.fields["item"][1:]
    named = {key: given[key] for key in given if not key.endswith("_field")} | {"data_path": str(tmp_path / "split")}
    again = create_dataset(LLMConfig("Pop", "tiny-split", config_dict=named)).item_texts
    assert sorted(again.names) == sorted(texts.names)
    assert again.columns == {"year_field": "item_text", "category_field": "title_text"}


@pytest.mark.parametrize("key", ["title_field", "year_field", "category_field"])
def test_a_column_of_texts_that_is_absent_is_refused(key: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Also of a model that reads no titles: its candidates would be unique by item id, and so others than those of all models."""
    config = LLMConfig("Pop", "tiny", config_dict={**settings, key: "genere"})
    with pytest.raises(ValueError, match=f"{key}: there is no column 'genere' in .*tiny.item; its columns are item_id, title"):
        candidate_sets(config, create_dataset(config))
    full = LLMConfig("Pop", "tiny", config_dict={**settings, key: "genere", "eval_args": {"mode": "full"}})
    with pytest.raises(ValueError, match=f"{key}: there is no column 'genere'"):
        write_split(full, create_dataset(full), tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_what_cannot_be_exported_is_refused(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for given, words in (
        (options(settings, tmp_path / "there"), "it exists; remove it or give another folder"),
        (
            [*options(settings, tmp_path / "new"), "--candidates={'source': 'retriever'}"],
            "those of a retriever need its training",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["data", "export", "--dataset=tiny", *given])
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_data_set_without_titles_is_exported_without_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "plain"
    folder.mkdir(parents=True)
    (folder / "plain.inter").write_text((Path(settings["data_path"]) / "tiny" / "tiny.inter").read_text())
    config = LLMConfig("Pop", "plain", config_dict={**settings, "data_path": str(tmp_path / "data")})
    files = write_split(config, create_dataset(config), tmp_path / "split")
    names = {file.name for file in files}
    assert "plain-split.inter" in names and not names & {"items.parquet", "plain-split.item", "plain-split.yaml"}


@pytest.mark.parametrize(
    "form",
    [
        {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"}},
        {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "RO", "group_by": "user", "mode": "full"}},
        {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}, "tie_order": "item"},
        {"benchmark_filename": ["train", "valid", "test"], "eval_args": {"mode": "full"}},
    ],
)
def test_other_forms_of_data_are_exported_as_a_run_splits_them(
    form: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "formed"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = [f"u{user}\ti{item}\t{rng.integers(1, 9) * 10}" for user in range(20) for item in rng.permutation(25)[:9]]
    rng.shuffle(lines)
    cuts = {"": lines, ".train": lines[:120], ".valid": lines[120:150], ".test": lines[150:]}
    for name, own in cuts.items():
        (folder / f"formed{name}.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *own]) + "\n")
    given = {**settings, "data_path": str(tmp_path / "data"), "normalize_all": False, **form}
    config = LLMConfig("BPR", "formed", config_dict=given)
    dataset = create_dataset(config)
    parts = [loader._dataset for loader in data_preparation(config, dataset)]
    write_split(config, create_dataset(config), tmp_path / "split")
    time_of = {tuple(line.split("\t")[:2]): float(line.split("\t")[2]) for line in lines}
    for phase, part in zip(("train", "valid", "test"), parts, strict=True):
        table = pd.read_parquet(tmp_path / "split" / f"{phase}.parquet")
        assert rows(table, "user", "item") == triples(dataset, part), phase
        assert [time_of[pair] for pair in zip(table["user"], table["item"], strict=True)] == table["timestamp"].tolist()
        assert table["timestamp"].is_monotonic_increasing


@pytest.mark.parametrize("parts", [1, 1000, 10**6, 10**9])
def test_times_for_rectools_are_in_seconds_or_parts_of_them(parts: int) -> None:
    times = (np.array([-5, 1_600_000_000, 1_600_000_000, 1_600_000_001]) * parts).astype(np.float64)
    found = _increasing(times)
    assert (found.diff().dropna() > pd.Timedelta(0)).all()
    assert found.dt.round("ms").astype(str).tolist() == [
        "1969-12-31 23:59:55",
        *["2020-09-13 12:26:40"] * 2,
        "2020-09-13 12:26:41",
    ]
