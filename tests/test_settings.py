"""Any keys with any values, from any sources: a run's configuration, or an error that names the key.

Hypothesis makes the values. Merging is compared with a reference, and what is accepted with the range that the comment gives.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from recbole_llm import quick_start
from recbole_llm.config import LLMConfig
from recbole_llm.config.checks import check
from recbole_llm.config.definitions import Interval, Type
from recbole_llm.config.property_files import PropertyFiles, properties_folder, read_yaml
from recbole_llm.config.recbole_keys import SUCCESSORS
from recbole_llm.config.values import as_literals, parse_value
from recbole_llm.leaderboard.task import _literal

FILES = PropertyFiles(properties_folder())
OUTER = sorted(key for key in FILES.definitions if "." not in key)
SLOWER = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FASTER = settings(SLOWER, max_examples=150)

WORDS = sorted(
    {choice for one in FILES.definitions.values() for choice in one.choices} | {"", "x", "full", "[5,inf)", "[5,", "ten", "~"}
)
NUMBERS = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 0.5, 2**63, 2**32, 1e400]))
SIMPLE = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=6))
INNER = st.one_of(
    st.sampled_from(sorted({key.rpartition(".")[2] for key in FILES.definitions if "." in key})), st.text(max_size=4)
)
VALUES = st.recursive(
    SIMPLE, lambda one: st.one_of(st.lists(one, max_size=3), st.dictionaries(INNER, one, max_size=3)), max_leaves=6
)
KEYS = st.one_of(st.sampled_from(OUTER), st.sampled_from(sorted(SUCCESSORS)), st.text(max_size=8))


@pytest.fixture(autouse=True)
def _shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def configured(sources: list[dict[str, Any]], model: str = "TALLRec") -> LLMConfig:
    """The configuration of values from two files, a dictionary and the command line."""
    *files, given, line = sources
    names = []
    for number, values in enumerate(files):
        names.append(f"{number}.yaml")
        Path(names[-1]).write_text(json.dumps(values), encoding="utf-8")
    return LLMConfig(model, "tiny", names, as_literals(given), [f"--{key}={_literal(value)}" for key, value in line.items()])


@FASTER
@given(key=KEYS, value=VALUES)
def test_a_value_is_accepted_or_refused_by_the_name_of_its_key(key: str, value: Any) -> None:
    try:
        check({key: value}, "a.yaml", FILES, {})
    except ValueError as error:
        assert str(error).startswith((f"{key}: ", f"{key}.", f"unknown key `{key}` in a.yaml")) or f" of {key}" in str(error)
        assert "a.yaml" in str(error)
    else:
        assert FILES.definitions[key].accepts(value)


@SLOWER
@given(sources=st.lists(st.dictionaries(KEYS.filter(lambda key: key.isidentifier()), VALUES, max_size=2), min_size=4, max_size=4))
@example(sources=[{}, {}, {"eval_args": {"mode": {}}}, {}])
@example(sources=[{"candidates": 5}, {}, {}, {"candidates": {"seed": 1}}])
@example(sources=[{"llm": [1]}, {"text_encoder": 5}, {"init_from": {}}, {"data_path": "\0"}])
def test_a_run_is_configured_or_refused_by_the_name_of_a_key(sources: list[dict[str, Any]], tmp_path: Path) -> None:
    try:
        configured(sources)
    except ValueError as error:
        given = {key for values in sources for key in values}
        inner = {name for values in sources for value in values.values() if isinstance(value, dict) for name in value}
        assert any(key in str(error) for key in given | inner), error


# -- values that each key alone accepts --------------------------------------------------------------------------------


def of_type(one: Type) -> st.SearchStrategy[Any]:
    """Values of a type."""
    if one.choices:
        return st.sampled_from([choice.replace("N", "5") if choice.endswith("N") else choice for choice in one.choices])
    bounds = one.range or Interval(-100, 100, (True, True))
    low = max(bounds.low, -100)
    high = min(bounds.high, low + 100)
    if one.kind == "int":
        return st.integers(int(low) + (not bounds.closed[0]), int(high))
    if one.kind == "float":
        return st.floats(low, high, exclude_min=not bounds.closed[0], exclude_max=high == bounds.high and not bounds.closed[1])
    entries = st.one_of(*map(of_type, one.entries)) if one.entries else SIMPLE
    return {
        "bool": st.booleans(),
        "str": st.sampled_from(["x", "title", "NDCG@5", "a: b", "10", "~"]),
        "interval": st.sampled_from(["[5,inf)", "(0, 3.5]", "[1,2];(4,5)"]),
        "list": st.lists(entries, max_size=3),
        "dict": st.dictionaries(st.sampled_from(["a", "b", "inter"]), entries, max_size=2),
        "settings": st.fixed_dictionaries({}, optional={"epochs": st.integers(0, 3)}),
    }[one.kind]


def accepted(key: str) -> st.SearchStrategy[Any]:
    """Values that a key accepts, partial dictionaries included."""
    definition = FILES.definitions[key]
    inner = {name.rpartition(".")[2]: accepted(name) for name in FILES.definitions if name.rpartition(".")[0] == key}
    kinds = [
        st.fixed_dictionaries({}, optional=inner) if inner and one.kind == "dict" else of_type(one) for one in definition.types
    ]
    return st.one_of(*kinds, *[st.none()] * definition.optional)


@FASTER
@given(data=st.data(), key=st.sampled_from(sorted(FILES.definitions)))
def test_a_value_is_read_alike_from_every_source(data: st.DataObject, key: str) -> None:
    value = data.draw(accepted(key))
    assert FILES.definitions[key].accepts(value)
    assert parse_value(_literal(value)) == value
    Path("own.yaml").write_text(json.dumps({key.rpartition(".")[2]: value}), encoding="utf-8")
    assert read_yaml("own.yaml") == json.loads(Path("own.yaml").read_text())
    if "." not in key:
        check({key: value}, "a.yaml", FILES, {})


# -- merging -----------------------------------------------------------------------------------------------------------

WHOLE = {"load_col", "unload_col", "unused_col", "slices", "merge_beside", "eval_args.split"}


def reference(key: str, one: Any, two: Any) -> Any:
    """The value of a key that two sources give, the later one ``two``."""
    if key == "eval_args.mode" and isinstance(one, str) and isinstance(two, Mapping) and two:
        one = {"valid": one, "test": one}  # the text is the mode of both phases
    if not (isinstance(one, Mapping) and isinstance(two, Mapping)) or key in WHOLE:
        return two
    both = {name: reference(f"{key}.{name}", one[name], two[name]) for name in one if name in two}
    return {**one, **two, **both}


def test_the_dictionaries_that_are_replaced_are_those_whose_comments_say_so() -> None:
    assert {key for key, one in FILES.definitions.items() if one.whole} == WHOLE


MERGED = ("candidates", "eval_args", "builtin_lm", "slices", "load_col", "prompts", "cf_config", "merge_beside", "max_memory")


@FASTER
@given(sources=st.lists(st.fixed_dictionaries({}, optional={key: accepted(key) for key in MERGED}), max_size=4))
@example(sources=[{"eval_args": {"mode": {"valid": "full"}}}, {"eval_args": {"mode": {"test": "uni5"}}}])
@example(sources=[{"eval_args": {"mode": "full"}}, {"eval_args": {"mode": {"test": "uni5"}}}])
@example(sources=[{"candidates": {"file": {"valid": "a"}}}, {"candidates": {"seed": 1, "file": {"test": "b"}}}])
def test_dictionaries_merge_through_all_sources_in_their_order(sources: list[dict[str, Any]]) -> None:
    expected: dict[str, Any] = {}
    for values in sources:
        expected = {**expected, **{key: reference(key, expected.get(key), value) for key, value in values.items()}}
    before = copy.deepcopy(sources)
    assert FILES.merge(*sources) == expected
    assert sources == before, "a source is not changed"


@SLOWER
@given(data=st.data())
def test_a_run_has_the_merged_dictionaries_over_its_defaults(data: st.DataObject, tmp_path: Path) -> None:
    keys = {key: accepted(key) for key in ("candidates", "builtin_lm", "slices", "prompts", "cf_config")}
    keys["load_col"] = st.sampled_from([{"inter": ["user_id"]}, {"inter": "*", "item": ["item_id"]}, None])
    sources = data.draw(st.lists(st.fixed_dictionaries({}, optional=keys), min_size=4, max_size=4))
    defaults = LLMConfig("ALLMRec", "tiny").final_config_dict
    config = configured(sources, "ALLMRec")
    for key in keys:
        expected = defaults[key]
        for values in sources:
            expected = reference(key, expected, values[key]) if key in values else expected
        assert config[key] == expected


# -- cases of users ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"title_field": None},
            "title_field: None in config_dict is not a string or a list of strings; remove it to use the default",
        ),
        (
            {"user_inter_num_interval": "[5,"},
            "user_inter_num_interval: '\\[5,' in .* is not an interval such as '\\[5,inf\\)' or ~",
        ),
        ({"item_inter_num_interval": "[5,3]"}, r"item_inter_num_interval: \[5, 3\] in .* is not an interval"),
        ({"item_inter_num_interval": "(5,5)"}, r"item_inter_num_interval: \(5, 5\) in .* is not an interval"),
        ({"user_inter_num_interval": 5}, "user_inter_num_interval: 5 in .* is not an interval"),
        (
            {"val_interval": {"rating": ">3"}},
            "val_interval: {'rating': '>3'} in .* is not a dictionary of intervals .* or lists.*; change rating: '>3'",
        ),
        ({"train_batch_size": 64.0}, "train_batch_size: 64.0 in .* is not a whole number of at least 1; give 64"),
        ({"epochs": "'10'"}, "epochs: '10' in .* is not a whole number of at least 0; give 10 without quotes"),
        ({"epochs": True}, "epochs: True in .* is not a whole number"),
        ({"hidden_act": "geluu"}, "hidden_act: 'geluu' in .* is not one of gelu, relu, swish, tanh, sigmoid"),
        ({"dnn_type": "gru"}, "dnn_type: 'gru' in .* is not one of trm, ave"),
        ({"mask_ratio": 0}, "mask_ratio: 0 in .* is not a number"),
        ({"learning_rate": float("nan")}, "learning_rate: nan in .* is not a number of at least 0"),
        ({"learning_rate": -0.1}, "learning_rate: -0.1 in .* is not a number of at least 0; remove it to use the default, 0.001"),
        ({"learner": "adan"}, "learner: 'adan' in .* is not one of adam, .*; did you mean 'adam'"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob: 1.5 in .* is not a number in \[0, 1\)"),
        ({"seed": 2**32}, r"seed: 4294967296 in .* is not a whole number in \[0, 4294967295\]"),
        ({"seed": 10**400}, "seed: 1000"),
        ({"metrics": ["Hit", "RMSE"]}, "metrics: Hit measures rankings, RMSE click labels in config_dict; remove one of them"),
        ({"metrics": "AUC", "valid_metric": "AUC"}, "metrics: AUC in config_dict measures click labels, .*'mode': 'labeled'"),
        ({"valid_metric_bigger": False}, "valid_metric_bigger: False in config_dict contradicts NDCG@10, of which the larger"),
        ({"eval_args": {"mode": "uni"}}, "eval_args.mode: 'uni' in .* is not one of candidates, full, labeled, uniN, popN"),
        ({"eval_args": {"mode": "uni0"}}, "eval_args.mode: 'uni0'"),
        ({"eval_args": {"mode": {"valid": "ful"}}}, "eval_args.mode.valid: 'ful' in .*; did you mean 'full'"),
        ({"eval_args": {"mode": {"val": "full"}}}, "unknown key `val` of eval_args.mode in .*; did you mean `valid`"),
        ({"eval_args": {"modes": "full"}}, "unknown key `modes` of eval_args in .*; did you mean `mode`"),
        ({"eval_args": {"split": {"LS": "valid"}}}, "eval_args.split.LS: 'valid' in .* is not one of valid_and_test"),
        ({"eval_args": {"split": {"LS": 1}}}, "eval_args.split.LS: 1 in .* is not one of .*; give 'valid_and_test', for example"),
        (
            {"eval_args": {"split": {}, "mode": "full"}},
            "eval_args: split {} must be one of {'LS': 'valid_and_test'}",
        ),
        ({"eval_args": {"split": {"RS": [8, 2]}, "mode": "full"}}, "eval_args: split .* needs three shares"),
        ({"candidates": {"num": 9}}, "unknown key `num` of candidates in config_dict; did you mean `num_negatives`"),
        ({"candidates": {"file": {"tests": "x"}}}, "unknown key `tests` of candidates.file in .*; did you mean `test`"),
        (
            {"train_neg_sample_args": {"sample": 1}},
            "unknown key `sample` of train_neg_sample_args in .*; did you mean `sample_num`",
        ),
        (
            {"train_neg_sample_args": {"distribution": "pop"}},
            "train_neg_sample_args.distribution: 'pop' in .*uniform, popularity",
        ),
        ({"cf_config": {"epoch": 1}}, "unknown key `epoch` in cf_config of config_dict; did you mean `epochs`"),
        ({"retriever_config": {"epochs": "x"}}, "epochs: 'x' in retriever_config of config_dict is not a whole number"),
        ({"merge_beside": {"a": {"merge_steps": -1}}}, r"merge_steps: -1 in merge_beside\['a'\] of config_dict is not"),
        ({"prompts": {"own": 5}}, "prompts: {'own': 5} in .* is not a dictionary of strings"),
        ({5: 1}, "unknown key `5` in config_dict"),
        ({"eval_setting": "TO_LS,full"}, "unknown key `eval_setting` in config_dict; .*give eval_args: {'split'"),
        (
            {"group_by_user": True},
            "unknown key `group_by_user` in .*; RecBole 1.2 has none of this name; give eval_args: {'group_by'",
        ),
        ({"training_neg_sample_num": 1}, "unknown key `training_neg_sample_num` in .*give train_neg_sample_args"),
        ({"neg_sampling": {"uniform": 1}}, "unknown key `neg_sampling` in .*give train_neg_sample_args"),
        ({"split_ratio": [8, 1, 1]}, "unknown key `split_ratio` in .*'RS'"),
        ({"leave_one_out_num": 2}, "unknown key `leave_one_out_num` in .*'LS': 'valid_and_test'"),
        ({"benchmark_filename": []}, r"benchmark_filename: \[\] must be a list of two or three names"),
        ({"load_col": {}}, "load_col: {} has no columns of the .inter file; .* .load_col is given in config_dict"),
        ({"local_rank": 0}, "local_rank: 0 in config_dict: this option of RecBole is not supported"),
    ],
)
def test_what_is_refused_says_why_and_what_to_give(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMConfig("SASRec", "tiny", config_dict=values)


@pytest.mark.parametrize("key", sorted(SUCCESSORS))
def test_hints_name_keys_that_there_are(key: str) -> None:
    assert key not in FILES.definitions
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", SUCCESSORS[key])) - {"valid_and_test"}
    known = {name.rpartition(".")[2] for name in FILES.definitions}
    assert named <= known, f"{key}: {named - known}"


def test_a_partial_mode_holds_for_its_phase_and_a_single_one_for_both() -> None:
    def phases(*sources: dict[str, Any] | str) -> tuple[list[str], dict[str, str]]:
        config = configured([{"eval_args": {"mode": mode}} for mode in sources] + [{}] * (4 - len(sources)), "Pop")
        return config["candidate_phases"], config["eval_args"]["mode"]

    assert phases({"valid": "candidates"}) == (["valid", "test"], {"valid": "full", "test": "full"})
    assert phases({"test": "uni9"}) == ([], {"valid": "uni9", "test": "uni9"})  # as in RecBole
    assert phases({"valid": "full"}, {"test": "candidates"}) == (["test"], {"valid": "full", "test": "full"})
    assert phases({"valid": "full"}, {"test": "uni9"}) == ([], {"valid": "full", "test": "uni9"})
    assert phases("uni9", {"test": "full"}) == ([], {"valid": "uni9", "test": "full"})
    assert phases({"test": "full"}, "uni9", {"valid": "candidates"}) == (["valid"], {"valid": "full", "test": "uni9"})
    with pytest.raises(ValueError, match=r"eval_args: mode {} names no phase.* \(eval_args is given in 0\.yaml\)"):
        phases({})


def test_an_interval_may_stand_without_quotes_on_a_command_line() -> None:
    for text in ("[5,30]", "'[5,30]'", "[5,inf)", "(1,2];[5,inf)"):
        LLMConfig("Pop", "tiny", cmd_line=[f"--user_inter_num_interval={text}"])


def test_another_split_replaces_the_default_as_a_whole() -> None:
    config = configured([{"eval_args": {"split": {"RS": [8, 1, 1]}}}, {}, {"eval_args": {"mode": "full"}}, {}], "Pop")
    assert config["eval_args"]["split"] == {"RS": [8, 1, 1]} and config["eval_args"]["order"] == "TO"


def bomb(first: str, form: str) -> str:
    """Twenty lines, each of which stands for nine times as many values as the one before."""
    lines = [f"k0: &k0 {first}"]
    lines += [f"k{n}: &k{n} " + form.format(", ".join([f"*k{n - 1}"] * 9)) for n in range(1, 20)]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1\nseed: 2\nepochs: 3\n", "`epochs` is given twice.*line 3"),
        ("candidates: {seed: 1, seed: 2}\n", "`seed` is given twice"),
        ("cf_config: &a {epochs: 1, x: *a}\n", "not a YAML file"),
        (bomb("[x]", "[{}]"), "its aliases stand for more than 100,000 values"),
        (bomb("{x: 1}", "{{<<: [{}]}}"), "its aliases stand for more than 100,000 values"),
        ("a: " + "[" * 10_000, "not a YAML file"),
        ("seed: 2020-13-45\n", "not a YAML file"),
        ("system: !!python/name:os.system\n", "not a YAML file"),
        ("? [1, 2]\n: 3\n", "not a YAML file"),
    ],
)
def test_files_of_another_form_are_named(text: str, message: str) -> None:
    Path("own.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)own.yaml: .*{message}"):
        LLMConfig("Pop", "tiny", ["own.yaml"])


def test_a_byte_order_mark_is_no_part_of_a_key_and_latin_1_is_refused() -> None:
    Path("own.yaml").write_bytes(b"\xef\xbb\xbfepochs: 3\n")
    assert LLMConfig("Pop", "tiny", "own.yaml")["epochs"] == 3
    Path("own.yaml").write_bytes("noun: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="own.yaml: not a YAML file .*utf-8"):
        LLMConfig("Pop", "tiny", ["own.yaml"])


def test_use_gpu_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert LLMConfig("Pop", "tiny", config_dict={"gpu_id": 0})["device"].type == "cuda"
    assert LLMConfig("Pop", "tiny", config_dict={"gpu_id": 0, "use_gpu": False})["device"].type == "cpu"


@pytest.mark.parametrize(
    ("in_file", "in_dict", "in_line", "on_cpu"),
    [
        (None, {}, [], False),
        ("False", {}, [], True),
        ("True", {"use_gpu": "False"}, [], True),
        ("False", {"use_gpu": True}, [], False),
        ("False", {}, ["--use_gpu=True"], False),
        ("True", {}, ["--use_gpu=false"], True),
    ],
)
def test_processes_that_join_before_the_configuration_know_use_gpu_of_any_source(
    in_file: str | None, in_dict: dict[str, Any], in_line: list[str], on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def joined(*, on_cpu: bool) -> Any:
        asked.append(on_cpu)
        raise InterruptedError

    monkeypatch.setattr(quick_start, "joined", joined)
    Path("own.yaml").write_text(f"use_gpu: {in_file}\n" if in_file else "epochs: 1\n")
    for files in (["own.yaml"], "own.yaml"):
        with pytest.raises(InterruptedError):
            quick_start.run_recbole_llm("Pop", "tiny", files, in_dict, cmd_line=in_line)
    assert asked == [on_cpu, on_cpu]


# -- a model of the user -----------------------------------------------------------------------------------------------


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``own_model(lines)``: the name of a model whose property file has these lines."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("recbole_llm.registry._own", {})
    monkeypatch.delitem(sys.modules, "own_settings", raising=False)

    def make(text: str) -> str:
        (tmp_path / "own_settings.py").write_text(
            "from recbole.model.general_recommender import BPR\n\n\nclass OwnSettings(BPR):\n    pass\n"
        )
        (tmp_path / "OwnSettings.yaml").write_text(text)
        return "own_settings:OwnSettings"

    return make


def test_the_keys_of_a_users_model_are_checked_as_its_file_says(own_model: Any) -> None:
    model = own_model(
        "extends: parts/llm\nembedding_size: 8    # (int in [8, 16]) of mine\nshare: 0.1  # (float in [0, 1)) share\n"
        "free: x\ntable: {a: 1}   # (dict of int) replaced as a whole\n"
    )
    config = LLMConfig(model, "tiny", config_dict={"free": [1], "share": 0, "table": {"b": 2}})
    assert (config["free"], config["share"], config["table"], config["embedding_size"]) == ([1], 0, {"b": 2}, 8)
    for values, message in (
        ({"share": 1}, r"share: 1 in config_dict is not a number in \[0, 1\)"),
        ({"embedding_size": 64}, r"embedding_size: 64 in config_dict is not a whole number in \[8, 16\]"),
        ({"fre": 1}, "unknown key `fre` in config_dict"),
    ):
        with pytest.raises(ValueError, match=message):
            LLMConfig(model, "tiny", config_dict=values)
    assert LLMConfig("BPR", "tiny")["embedding_size"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("share: 2  # (float in [0, 1)) share\n", r"share: 2 in .*OwnSettings\.yaml is not a number in \[0, 1\)"),
        ("epochs: ten\n", r"epochs: 'ten' in .*OwnSettings\.yaml is not a whole number"),
        ("extends: parts/lm\n", r"OwnSettings\.yaml: extends: 'parts/lm' is no file of"),
        ("share: 2  # (share) of mine\n", r"\(share\): there is no type 'share'; known: int, float"),
        (
            "llm: smollm2-135m\n",
            r"OwnSettings\.yaml: `llm` is needed before .*; give --llm=smollm2-135m, or set it in a file of --con",
        ),
        ("text_encoder_path: some/folder\n", r"OwnSettings\.yaml: `text_encoder_path` is needed before"),
        ("data_path: elsewhere\n", r"OwnSettings\.yaml: `data_path` is needed before"),
        ("share: 2  # (float) mine\nshare: 3\n", r"OwnSettings\.yaml: not a YAML file .*`share` is given twice"),
    ],
)
def test_mistakes_in_the_file_of_a_users_model_are_named(own_model: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        LLMConfig(own_model(text), "tiny")
