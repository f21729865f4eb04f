"""What wins over what, what is refused, and what is never evaluated."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm import registry
from recbole_llm.config import LLMConfig, parse_value, properties_folder
from recbole_llm.model.allmrec import ALLMRec
from recbole_llm.model.tallrec import TALLRec

PROPERTIES = [file for file in sorted(properties_folder().rglob("*.yaml")) if file.parent.name != "leaderboard"]


@pytest.fixture(autouse=True)
def _shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes CUDA_VISIBLE_DEVICES at every Config; put it back afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of properties/ that a test may change."""
    copy = tmp_path / "properties"
    for file in PROPERTIES:
        target = copy / file.relative_to(properties_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text(encoding="utf-8"))
    monkeypatch.setattr("recbole_llm.config.properties_folder", lambda: copy)
    return copy


def write(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


# -- precedence --------------------------------------------------------------------------------------------------------


def test_later_sources_win(folder: Path, tmp_path: Path) -> None:
    def value(*, model: str = "TALLRec", **given: Any) -> Any:
        return LLMConfig(model, "tiny", **given)["stopping_step"]

    def add(file: str, number: int) -> None:
        with (folder / file).open("a") as stream:
            stream.write(f"\nstopping_step: {number}\n")

    assert value() == 10  # RecBole's own
    (folder / "dataset" / "tiny.yaml").write_text("")
    for number, file in enumerate(["overall.yaml", "dataset/tiny.yaml", "model/TALLRec.yaml"], start=1):
        add(file, number)
        assert value() == number
    assert value(model="Pop") == 2  # another model's file does not count
    add("llm/builtin.yaml", 4)
    given: dict[str, Any] = {"config_dict": {"llm": "builtin"}}
    assert value(**given) == 4
    given["config_file_list"] = [write(tmp_path / "a.yaml", stopping_step=5)]
    assert value(**given) == 5
    given["config_file_list"].append(write(tmp_path / "b.yaml", stopping_step=6))
    assert value(**given) == 6
    given["config_dict"] = {"llm": "builtin", "stopping_step": 7}
    assert value(**given) == 7
    assert value(**given, cmd_line=["--stopping_step=8"]) == 8


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


@pytest.mark.parametrize("change", [{"split": {"RS": [0.8, 0.1, 0.1]}}, {"split": {"LS": "test_only"}}, {"order": "RO"}])
def test_candidates_with_another_split_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="eval_args: candidates need .*'mode': 'full'"):
        LLMConfig("Pop", "tiny", config_dict={"eval_args": change})
    LLMConfig("Pop", "tiny", config_dict={"eval_args": {**change, "mode": "full"}})


def test_sequential_models_with_cross_entropy_need_no_negatives() -> None:
    """RecBole's own default is refused by its own SASRec."""
    assert LLMConfig("SASRec", "tiny")["train_neg_sample_args"]["distribution"] == "none"
    assert LLMConfig("SASRec", "tiny", config_dict={"loss_type": "BPR"})["train_neg_sample_args"]["sample_num"] == 1
    assert LLMConfig("BPR", "tiny")["train_neg_sample_args"]["distribution"] == "uniform"


def test_labelled_models_keep_recboles_evaluation() -> None:
    config = LLMConfig("FM", "tiny")
    assert config["candidate_phases"] == [] and config["metrics"] == ["AUC", "LogLoss"]


# -- a run that another one takes up -----------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``kept(**given)``: the folder of a run on ml-100k with these settings, which TALLRec and ALLMRec may take up."""
    for model_class in (TALLRec, ALLMRec):
        monkeypatch.setattr(model_class, "supports_init_from", True, raising=False)

    def kept(stages: dict[str, str] | None = None, name: str = "run", model: str = "TALLRec", **given: Any) -> str:
        folder = tmp_path / "saved" / "runs" / name
        folder.mkdir(parents=True)
        config = LLMConfig(model, "ml-100k", config_dict=given).plain()
        record = {"model": model, "dataset": "ml-100k", "config": config, "stages": stages or {}}
        (folder / "record.json").write_text(json.dumps(record))
        return str(folder)

    return kept


def test_settings_of_a_kept_run_win_over_files_and_yours_over_these(kept: Any, tmp_path: Path) -> None:
    texts = {"system": "'[1]'", "prompts": {"own": "{history}"}}  # text stays text
    run = kept(r=3, llm="qwen2.5-0.5b", lora_epochs=9, max_history=7, builtin_lm={"tokens": 5}, top_k_target=2, **texts)
    config = LLMConfig("TALLRec", "tiny", [write(tmp_path / "own.yaml", r=4)], {"init_from": run}, ["--lora_epochs=8"])
    assert config.init_run is not None and config.init_run.root == tmp_path / "saved"
    assert (config["r"], config["lora_epochs"], config["max_history"], config["top_k_target"]) == (4, 8, 7, 2)
    assert (config["llm"], config["llm_path"], config["lora_batch_size"]) == ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 128)
    assert config["system"] == "[1]" and {"own", "listwise"} < config["prompts"].keys() and config["builtin_lm"]["tokens"] == 5
    other = config.for_dataset("amazon-beauty")
    assert (other["r"], other["lora_epochs"], other["max_history"], other["noun"]) == (4, 8, 7, "product")
    assert config.for_model("SASRec", {}).init_run is None


def test_what_a_kept_run_says_about_its_data_and_measurement_is_left_to_it(kept: Any) -> None:
    about_data = {
        "candidates": {"num_negatives": 3, "seed": 1},
        "eval_users": 5,
        "slices": {},
        "metrics": ["Hit", "NDCG"],
        "topk": [5],
        "valid_metric": "NDCG@5",
        "eval_args": {"mode": "full"},
        "eval_batch_size": 7,
        "metric_decimal_place": 3,
        "new_items": 0.2,
        "cold_user_length": 4,
        "retriever": "BPR",
        "retriever_config": {"epochs": 1},
        "retriever_top": 3,
        "title_field": "t",
        "year_field": "y",
        "brand_field": "b",
        "category_field": "c",
        "no_value": ["x"],
        "noun": "n",
        "article_suffix": False,
        "verb": "v",
        "load_col": {"inter": ["user_id"]},
        "show_progress": False,
        "seed": 3,
        "save_every_seconds": 1.0,
        "checkpoint_dir": "there",
        "data_path": "there",
        "cf_checkpoint": "there",
    }
    run = kept(model="ALLMRec", max_history=7, **about_data)
    own, taken = (LLMConfig("ALLMRec", "amazon-beauty", config_dict={"init_from": given}) for given in (None, run))
    changed = {key for key, value in taken.plain().items() if value != own.plain()[key]}
    assert changed == {"max_history", "init_from"}


@pytest.mark.parametrize("llm", [None, "builtin"])
def test_a_backbone_beside_a_kept_run_is_refused_unless_it_is_that_runs(kept: Any, llm: str | None) -> None:
    run = kept(llm=llm)
    for given in ({}, {"llm": "builtin"}, {"llm_path": "here"}):
        config = LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, **given})
        assert config["llm_path"] == given.get("llm_path", "builtin")
    with pytest.raises(ValueError, match="--llm=qwen2.5-0.5b: init_from=.* was trained on builtin; leave llm out"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "qwen2.5-0.5b"})
    run = kept(llm_path="there", name="another")
    with pytest.raises(ValueError, match="--llm=builtin: init_from=.* was trained on there; leave llm out"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "builtin"})


def test_only_some_models_take_up_runs_and_only_their_own(kept: Any) -> None:
    run = kept()
    for model in ("LoRACocktail", "SASRec"):
        with pytest.raises(ValueError, match=f"init_from: {model} takes up no other run; leave init_from=.*run out"):
            LLMConfig(model, "tiny", config_dict={"init_from": run})
    file = Path(run) / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": "Laser"}))
    with pytest.raises(ValueError, match="init_from: .*run is a run of Laser, which TALLRec cannot take up; give .* of TALLRec"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run})
    with pytest.raises(ValueError, match="init_from: there is no run at nowhere"):
        LLMConfig("TALLRec", "tiny", cmd_line=["--init_from=nowhere"])
    assert LLMConfig("SASRec", "tiny", config_dict={"init_from": None}).init_run is None


def test_a_fingerprint_follows_what_a_kept_run_has_trained_not_where_it_lies(kept: Any) -> None:
    def fingerprint(run: str | None) -> str:
        return LLMConfig("TALLRec", "tiny", config_dict={"init_from": run}).fingerprint

    run = kept({"lm": "lm-1"})
    assert fingerprint(run) == fingerprint(f"{run}/record.json") == fingerprint(kept({"lm": "lm-1"}, name="again"))
    assert len({fingerprint(None), fingerprint(run), fingerprint(kept({"lm": "lm-2"}, name="other"))}) == 3


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("~", None),
        ("[1, 'a']", [1, "a"]),
        ("{'a': 1}", {"a": 1}),
        ("'3'", "3"),
        *((text, text) for text in ("1+1", "1/0", "...", "{{1}}", "{history}", "b'x'", "a b", "", "(" * 300, "\0")),
    ],
)
def test_values_are_read_as_literals(text: str, value: Any) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_nothing_is_evaluated() -> None:
    code = "__import__('os').system('touch x')"
    assert LLMConfig("Pop", "tiny", config_dict={"system": code})["system"] == code
    assert LLMConfig("Pop", "tiny", cmd_line=[f"--system={code}"])["system"] == code
    Path("own.yaml").write_text("system: !!python/object/apply:os.system ['touch x']\n")
    with pytest.raises(ValueError, match="own.yaml: not a YAML file"):
        LLMConfig("Pop", "tiny", ["own.yaml"])
    assert not Path("x").exists()


def test_sys_argv_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "--stopping_step=7", "--nonsense=1", "-x"])
    assert LLMConfig("Pop", "tiny")["stopping_step"] == 10


def test_a_value_may_hold_equals_signs() -> None:
    assert LLMConfig("Pop", "tiny", cmd_line=["--system=a=b=c"])["system"] == "a=b=c"


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="--seed is given twice, as '1' and '2'"):
        LLMConfig("Pop", "tiny", cmd_line=["--seed=1", "--seed=2"])
    assert LLMConfig("Pop", "tiny", cmd_line=["--seed=1", "--seed=1"])["seed"] == 1


@pytest.mark.parametrize("argument", ["seed=1", "--seed", "-s", "--seed 1"])
def test_arguments_of_another_form_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="is not of the form --key=value"):
        LLMConfig("Pop", "tiny", cmd_line=[argument])


def test_unknown_keys_name_key_source_and_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", max_histroy=5)
    with pytest.raises(ValueError, match=r"unknown key `max_histroy` in .*mine\.yaml; did you mean `max_history`\?"):
        LLMConfig("TALLRec", "tiny", [file])
    with pytest.raises(ValueError, match="unknown key `lerning_rate` in config_dict; did you mean `learning_rate`"):
        LLMConfig("Pop", "tiny", config_dict={"lerning_rate": 1})
    with pytest.raises(ValueError, match="unknown key `epoch` in the command line; did you mean `epochs`"):
        LLMConfig("Pop", "tiny", cmd_line=["--epoch=1"])


def test_one_file_may_serve_several_models(tmp_path: Path) -> None:
    """A key of LoRACocktail or of SASRec in a shared file is no typing error when another model runs."""
    LLMConfig("Pop", "tiny", [write(tmp_path / "shared.yaml", merge="uniform", n_heads=1)])


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        LLMConfig("Pop", "tiny", ["nowhere.yaml"])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml: a property file holds `key: value` lines, not a list"):
        LLMConfig("Pop", "tiny", [str(tmp_path / "list.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not a YAML file"):
        LLMConfig("Pop", "tiny", [str(tmp_path / "broken.yaml")])
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    LLMConfig("Pop", "tiny", [str(tmp_path / "empty.yaml")])


def test_model_and_dataset_may_stand_in_a_file_and_must_stand_somewhere(tmp_path: Path) -> None:
    config = LLMConfig(config_file_list=[write(tmp_path / "run.yaml", model="BPR", dataset="tiny")])
    assert (config["model"], config["dataset"]) == ("BPR", "tiny")
    with pytest.raises(ValueError, match="--dataset is missing"):
        LLMConfig("BPR")
    with pytest.raises(ValueError, match="--model is missing"):
        LLMConfig(dataset="tiny")


def test_a_valid_metric_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"valid_metric: NDCG@10 is not measured; .*topk is \[5\]"):
        LLMConfig("Pop", "tiny", config_dict={"topk": 5})
    with pytest.raises(ValueError, match=r"valid_metric: NDCG@10 is not measured; metrics are \['Hit'\]"):
        LLMConfig("Pop", "tiny", config_dict={"metrics": "Hit"})
    LLMConfig("Pop", "tiny", config_dict={"topk": 5, "valid_metric": "hit@5"})


def test_unknown_llm_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--llm=qwen9: .*known: builtin.*qwen2.5-0.5b.*--llm_path"):
        LLMConfig("TALLRec", "tiny", config_dict={"llm": "qwen9"})


@pytest.mark.parametrize(("given", "expected"), [({}, "3,5"), ({"gpu_id": "1"}, "1"), ({"gpu_id": 0}, "0")])
def test_the_shells_choice_of_gpus_holds_unless_another_is_given(
    given: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    config = LLMConfig("Pop", "tiny", config_dict=given)
    assert config["gpu_id"] == os.environ["CUDA_VISIBLE_DEVICES"] == expected


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
        {"save_dataset": True},
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
    write(tmp_path / name, weave="naive")
    assert LLMConfig("WeaveRec", "tiny", [name])["weave"] == "naive", "a file of the user's comes first"


def test_a_key_that_is_younger_than_kept_runs_leaves_them_what_they_are(folder: Path) -> None:
    with_key = LLMConfig("TALLRec", "tiny").fingerprint
    assert LLMConfig("TALLRec", "tiny", config_dict={"shuffled_title_control": True}).fingerprint != with_key
    overall = folder / "overall.yaml"
    overall.write_text(re.sub(r"(?m)^shuffled_title_control:.*\n", "", overall.read_text()))
    assert "shuffled_title_control" not in LLMConfig("TALLRec", "tiny").final_config_dict
    assert LLMConfig("TALLRec", "tiny").fingerprint == with_key


def test_a_dataset_may_have_its_property_file_beside_its_data(tmp_path: Path) -> None:
    for name in ("mine", "amazon-beauty", "plain"):
        (tmp_path / name).mkdir()
    write(tmp_path / "mine" / "mine.yaml", noun="song", title_field="name", user_inter_num_interval="[5,inf)")
    write(tmp_path / "amazon-beauty" / "amazon-beauty.yaml", noun="soap")
    config = LLMConfig("WeaveRec", "mine", config_dict={"data_path": str(tmp_path), "verb": "heard"})
    assert (config["noun"], config["title_field"], config["verb"]) == ("song", "name", "heard")
    assert config["user_inter_num_interval"] == "[5,inf)"
    beauty = config.for_dataset("amazon-beauty")
    assert (beauty["noun"], beauty["verb"], beauty["user_inter_num_interval"]) == ("soap", "bought", "[0,inf)")
    assert config.for_dataset("plain")["noun"] == "item"


def test_a_property_file_beside_the_data_is_about_the_data(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "mine.yaml", noun="song", checkpoint_dir="/elsewhere")
    with pytest.raises(ValueError, match=r"mine\.yaml: `checkpoint_dir` says nothing about a dataset"):
        LLMConfig("Pop", "mine", config_dict={"data_path": str(tmp_path)})


# -- properties --------------------------------------------------------------------------------------------------------


def test_every_model_has_a_property_file_and_no_other_has() -> None:
    assert {file.stem for file in (properties_folder() / "model").glob("*.yaml")} == set(registry.MODELS)


@pytest.mark.parametrize("file", PROPERTIES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_property_files_parse_and_set_known_keys(file: Path) -> None:
    inside_llm = file.parent.parent.name == "llm"  # properties/llm/<llm>/<Model>.yaml
    tuned = file.parent.parent.name == "tuned"  # properties/tuned/<dataset>/<Model>.yaml
    named = tuned or file.parent.name == "weaverec"  # read where --config_files names it
    model = file.stem if tuned or file.parent.name == "model" or inside_llm else "WeaveRec" if named else "LoRACocktail"
    dataset = file.stem if file.parent.name == "dataset" else file.parent.name if tuned else "tiny"
    # a backbone that is given keeps properties/llm/builtin.yaml out
    llm = {"llm": file.stem} if file.parent.name == "llm" else {"llm_path": "builtin"}
    llm = {"llm": file.parent.name} if inside_llm else llm
    config = LLMConfig(model, dataset, [str(file)] if named else None, config_dict=llm)
    values = yaml.load(file.read_text(encoding="utf-8"), Loader=config.yaml_loader)
    values.pop("protocol", None)
    if "eval_args" in values:
        values["eval_args"]["mode"] = dict.fromkeys(["valid", "test"], values["eval_args"]["mode"])  # as RecBole sees it
    if "train_neg_sample_args" in values:  # RecBole has a long way to say none
        assert values.pop("train_neg_sample_args") is None and config["train_neg_sample_args"]["distribution"] == "none"
    assert values and {key: config[key] for key in values} == values
    # as a user's file the keys are checked: none is misspelt
    if file.name != "overall.yaml":
        LLMConfig(model, dataset, [str(file)])


@pytest.mark.parametrize(
    "file",
    [file for file in PROPERTIES if file.name == "overall.yaml" or file.parent.name == "model"],
    ids=lambda file: file.name,
)
def test_every_key_carries_a_comment(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").split("\n")
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\w+:", line) and " #" not in line and not before.startswith("#")
    ]
    assert not bare
