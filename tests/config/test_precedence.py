"""Which of several sources of a setting wins, and what another view of the settings has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_llm.config import LLMConfig
from tests.config.conftest import write

# -- precedence --------------------------------------------------------------------------------------------------------


def test_later_sources_win(folder: Path, tmp_path: Path) -> None:
    def value(*, model: str = "TALLRec", **given: Any) -> Any:
        return LLMConfig(model, "tiny", **given)["stopping_step"]

    def add(file: str, number: int) -> None:
        with (folder / file).open("a") as stream:
            stream.write(f"\nstopping_step: {number}\n")

    assert value() == 10  # RecBole's own
    (folder / "dataset" / "tiny.yaml").write_text("")
    (folder / "llm" / "qwen2.5-0.5b").mkdir(exist_ok=True)
    (folder / "llm" / "qwen2.5-0.5b" / "TALLRec.yaml").write_text("")
    given: dict[str, Any] = {"config_dict": {"llm": "qwen2.5-0.5b"}}
    files = ["overall", "evaluation", "dataset/tiny", "llm/qwen2.5-0.5b", "model/TALLRec", "llm/qwen2.5-0.5b/TALLRec"]
    for number, file in enumerate(files, start=1):
        add(f"{file}.yaml", number)
        assert value(**given) == number
    assert value(model="Pop") == 3  # another model's file does not count
    assert value(config_dict={"llm_path": "here"}) == 5  # no backbone's file does, but the recipe
    given["config_file_list"] = [write(tmp_path / "a.yaml", stopping_step=7)]
    assert value(**given) == 7
    given["config_file_list"].append(write(tmp_path / "b.yaml", stopping_step=8))
    assert value(**given) == 8
    given["config_dict"] = {"llm": "qwen2.5-0.5b", "stopping_step": 9}
    assert value(**given) == 9
    assert value(**given, cmd_line=["--stopping_step=11"]) == 11


def test_a_file_stands_over_those_that_it_extends(folder: Path) -> None:
    (folder / "parts" / "mine.yaml").write_text("stopping_step: 1\neval_step: 1\nepochs: 1\n")
    (folder / "model" / "TALLRec.yaml").write_text("extends: parts/mine\nstopping_step: 2\neval_step: 2\n")
    (folder / "model" / "MoLoRec.yaml").write_text("extends: [model/TALLRec, parts/merging]\nstopping_step: 3\nmerge: uniform\n")
    config = LLMConfig("MoLoRec", "tiny", config_dict={"llm_path": "here"})
    assert [config[key] for key in ("stopping_step", "eval_step", "epochs", "merge")] == [3, 2, 1, "uniform"]
    assert "extends" not in config


def test_partial_dicts_of_the_user_add_up(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.yaml", candidates={"num_negatives": 5}), write(tmp_path / "b.yaml", candidates={"seed": 7})]
    config = LLMConfig("Pop", "tiny", files, {"candidates": {"source": "popularity"}}, ["--candidates={'seed': 1}"])
    assert config["candidates"] == {"source": "popularity", "num_negatives": 5, "seed": 1, "file": None}
    config = LLMConfig("Pop", "tiny", [write(tmp_path / "c.yaml", slices={"cold": 0.1})], cmd_line=["--slices={'warm': 0.2}"])
    assert config["slices"] == {"warm": 0.2}  # replaced as a whole


@pytest.mark.parametrize(("key", "value"), [("user_inter_num_interval", "[5,inf)"), ("filter_inter_by_user_or_item", True)])
def test_filters_of_files_that_are_split_already_are_refused_wherever_they_stand(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    given = {"data_path": str(tmp_path), "benchmark_filename": ["train", "test"]}
    with pytest.raises(ValueError, match=f"{key}: .* is not applied to files that are split already"):
        LLMConfig("BPR", "mine", config_dict={**given, key: value})
    write(tmp_path / "mine" / "mine.yaml", **{key: value})
    with pytest.raises(ValueError, match=rf"{key}: .* is not applied .* \({key} is given in .*mine\.yaml\)"):
        LLMConfig("BPR", "mine", config_dict=given)
    beauty = LLMConfig("BPR", "amazon-beauty", config_dict={**given, "data_path": "here"})  # whose own property file has a 5-core
    assert beauty["user_inter_num_interval"] is None and not beauty["filter_inter_by_user_or_item"]


@pytest.mark.parametrize("key", ["config_files", "config_file"])
def test_files_that_a_file_names_are_refused_as_they_are_not_read(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{key}: other.yaml in .*a\.yaml: this option .* --config_files on the command line"):
        LLMConfig("Pop", "tiny", [write(tmp_path / "a.yaml", **{key: "other.yaml"})])


def test_shares_of_a_split_may_be_a_tuple() -> None:
    config = LLMConfig("Pop", "tiny", config_dict={"eval_args": {"split": {"RS": (0.8, 0.1, 0.1)}, "mode": "full"}})
    assert config["eval_args"]["split"] == {"RS": [0.8, 0.1, 0.1]}  # RecBole refuses any other sequence


def test_a_partial_dict_changes_its_keys_only() -> None:
    config = LLMConfig("Pop", "tiny", config_dict={"candidates": {"num_negatives": 9}})
    assert config["candidates"] == {"source": "uniform", "num_negatives": 9, "seed": 2020, "file": None}
    config = LLMConfig("Pop", "tiny", cmd_line=["--candidates={'source': 'popularity'}"])
    assert config["candidates"]["source"] == "popularity" and config["candidates"]["num_negatives"] == 19


def test_load_col_is_replaced_as_a_whole() -> None:
    config = LLMConfig("Pop", "tiny", config_dict={"load_col": {"inter": ["user_id", "item_id"]}})
    assert config["load_col"] == {"inter": ["user_id", "item_id"]}
    assert LLMConfig("Pop", "tiny")["load_col"]["inter"] == ["user_id", "item_id", "timestamp"]


def test_slices_are_replaced_as_a_whole() -> None:
    assert LLMConfig("Pop", "tiny")["slices"] == {"cold": 0.35, "warm": 0.35}
    assert LLMConfig("Pop", "tiny", config_dict={"slices": {"warm": 0.1}})["slices"] == {"warm": 0.1}
    assert LLMConfig("Pop", "tiny", cmd_line=["--slices={}"])["slices"] == {}


def test_a_run_on_two_datasets_reads_the_columns_that_they_share() -> None:
    given = {"train_dataset": "amazon-beauty", "title_field": "caption", "user_inter_num_interval": "[5,inf)"}
    config = LLMConfig("Pop", "ml-100k", config_dict=given)
    assert (config["title_field"], config["year_field"], config["category_field"]) == ("title", "year", "category")
    assert (config["no_value"], config["article_suffix"], config["user_inter_num_interval"]) == ([], False, None)
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    assert (config["noun"], config["verb"]) == ("movie", "watched")  # prompts speak of the tested dataset
    tested, trained = (config.for_dataset(name, whole=True) for name in ("ml-100k", "amazon-beauty"))
    assert (tested["title_field"], tested["year_field"], trained["title_field"]) == ("caption", "release_year", "title")
    assert tested["user_inter_num_interval"] == trained["user_inter_num_interval"] == "[5,inf)"


@pytest.mark.parametrize("model", ["Pop", "SASRec"])
def test_a_partial_eval_args_keeps_leave_one_out_by_time(model: str) -> None:
    args = LLMConfig(model, "tiny", config_dict={"eval_args": {"mode": "full"}})["eval_args"]
    assert args["split"] == {"LS": "valid_and_test"} and args["order"] == "TO"
    assert args["mode"] == {"valid": "full", "test": "full"}


def test_modes() -> None:
    candidates = LLMConfig("Pop", "tiny")
    assert candidates["candidate_phases"] == ["valid", "test"]
    assert candidates["eval_args"]["mode"] == {"valid": "full", "test": "full"}  # as RecBole sees it
    uni = LLMConfig("Pop", "tiny", config_dict={"eval_args": {"mode": "uni20"}})
    assert uni["candidate_phases"] == [] and uni["test_neg_sample_args"]["sample_num"] == 20
    both = LLMConfig("Pop", "tiny", config_dict={"eval_args": {"mode": {"valid": "full", "test": "candidates"}}})
    assert both["candidate_phases"] == ["test"]


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ({"split": {"RS": [0.8, 0.1, 0.1]}}, ["valid", "test"]),
        ({"split": {"LS": "test_only"}}, ["test"]),
        ({"split": {"RS": [0.8, 0, 0.2]}}, ["test"]),
        ({"order": "RO"}, ["valid", "test"]),
    ],
)
def test_phases_with_candidates_are_those_with_data(change: dict[str, Any], phases: list[str]) -> None:
    assert LLMConfig("Pop", "tiny", config_dict={"eval_args": change})["candidate_phases"] == phases
    assert LLMConfig("Pop", "tiny", config_dict={"eval_args": {**change, "mode": "full"}})["candidate_phases"] == []


def test_sequential_models_with_cross_entropy_need_no_negatives() -> None:
    """RecBole's own default is refused by its own SASRec."""
    assert LLMConfig("SASRec", "tiny")["train_neg_sample_args"]["distribution"] == "none"
    assert LLMConfig("SASRec", "tiny", config_dict={"loss_type": "BPR"})["train_neg_sample_args"]["sample_num"] == 1
    assert LLMConfig("BPR", "tiny")["train_neg_sample_args"]["distribution"] == "uniform"


def test_labelled_models_keep_recboles_evaluation() -> None:
    config = LLMConfig("FM", "tiny")
    assert config["candidate_phases"] == [] and config["metrics"] == ["AUC", "LogLoss"]


# -- views -------------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_results_not_bookkeeping() -> None:
    def fingerprint(**values: Any) -> str:
        return LLMConfig("TALLRec", "tiny", config_dict=values).fingerprint

    same = fingerprint()
    for values in (
        {"checkpoint_dir": "elsewhere"},
        {"data_path": "elsewhere"},
        {"show_progress": False},
        {"gpu_id": 1},
        {"worker": 2},
        {"state": "ERROR"},
        {"score_batch_tokens": 99},
        {"train_batch_tokens": 99},
        {"gradient_checkpointing": True},
        {"max_memory": {"cpu": "9GB"}},
        {"candidates": {"seed": 2020}},
    ):
        assert fingerprint(**values) == same, values
    changes = (
        {"seed": 1},
        {"r": 8},
        {"candidates": {"seed": 1}},
        {"llm_path": "x"},
        {"eval_users": 5},
        {"noun": "book"},
    )
    assert len({same, *(fingerprint(**values) for values in changes)}) == 1 + len(changes)


def test_another_dataset_of_the_run_has_its_own_words_and_the_runs_settings(tmp_path: Path) -> None:
    given = {"title_field": "movie_title", "noun": "film", "r": 2, "data_path": "here", "candidates": {"num_negatives": 3}}
    text = write(tmp_path / "own.yaml", llm_revision="1234567", system="[1]")
    config = LLMConfig("LoRACocktail", "ml-100k", [text], given, cmd_line=["--general_datasets=['amazon-beauty']"])
    other = config.for_dataset("amazon-beauty")
    assert (other["dataset"], other["title_field"], other["noun"], other["verb"]) == (
        "amazon-beauty",
        "title",
        "product",
        "bought",
    )
    assert (other["r"], other["candidates"]["num_negatives"], other["data_path"]) == (2, 3, "here/amazon-beauty")
    assert (other["llm_revision"], other["system"]) == ("1234567", "[1]")  # text stays text
    assert config["noun"] == "film"


def test_the_packages_own_property_files_are_found_from_any_folder(tmp_path: Path) -> None:
    name = "properties/weaverec/target-only.yaml"
    assert not Path(name).exists() and LLMConfig("WeaveRec", "tiny", [name])["weave"] == "target_only"
    (tmp_path / "properties" / "weaverec").mkdir(parents=True)
    write(tmp_path / name, weave="naive_merging")
    assert LLMConfig("WeaveRec", "tiny", [name])["weave"] == "naive_merging", "a file of the user's comes first"


def test_a_dataset_may_have_its_property_file_beside_its_data(tmp_path: Path) -> None:
    for name in ("mine", "amazon-beauty", "plain"):
        (tmp_path / name).mkdir()
    write(tmp_path / "mine" / "mine.yaml", noun="song", title_field="name", user_inter_num_interval="[6,inf)")
    write(tmp_path / "amazon-beauty" / "amazon-beauty.yaml", noun="soap")
    config = LLMConfig("WeaveRec", "mine", config_dict={"data_path": str(tmp_path), "verb": "heard"})
    assert (config["noun"], config["title_field"], config["verb"]) == ("song", "name", "heard")
    assert config["user_inter_num_interval"] == "[6,inf)"
    beauty = config.for_dataset("amazon-beauty")
    assert (beauty["noun"], beauty["verb"], beauty["user_inter_num_interval"]) == ("soap", "bought", "[5,inf)")
    assert config.for_dataset("plain")["noun"] == "item"


def test_a_property_file_beside_the_data_is_about_the_data(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "mine.yaml", noun="song", checkpoint_dir="/elsewhere")
    with pytest.raises(ValueError, match=r"mine\.yaml: `checkpoint_dir` does not describe a dataset"):
        LLMConfig("Pop", "mine", config_dict={"data_path": str(tmp_path)})


def test_the_users_own_ml_100k_comes_before_recboles(tmp_path: Path) -> None:
    def config(data_path: Path) -> LLMConfig:
        return LLMConfig("Pop", "ml-100k", config_dict={"data_path": str(data_path)})

    packaged = config(tmp_path)
    assert "dataset_example" in packaged["data_path"] and not packaged.own_copy
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "ml-100k.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n")
    own = config(tmp_path)
    assert own["data_path"] == str(tmp_path / "ml-100k") and own.own_copy
    assert own.record_file != packaged.record_file, "or a leaderboard would show the one for the other"
    assert config(tmp_path / "elsewhere").record_file == packaged.record_file
