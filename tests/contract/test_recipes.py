"""The papers' recipes: the tables of docs/models, held against what each model is set to on each real backbone.

A row of the table in "Settings of the paper" has a key and its published value, in code, or words where the published system has
no such value or we differ; the last column then names our default. A backbone's file (``properties/llm``) says what the backbone
is; it must change nothing of a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from recbole.config import Config

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.config.property_files import PropertyFiles, properties_folder
from recbole_llm.quick_start import run_recbole_llm

FILES = PropertyFiles(properties_folder())
MODELS = [
    name for name in registry.MODELS if name not in ("Imported", "Cascade", *registry.SHORTCUTS)
]  # those with a paper's recipe
LLMS = FILES.names("llm")
OWN = ["builtin", "smollm2-135m"]  # with training settings of their own, for two CPU cores
REAL = [name for name in LLMS if name not in OWN]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "models"
HEADER = "| setting | key | published | source | ours |"
# the pages whose tables a model has, later ones over earlier ones
PAGES = {
    "LoRACocktail": ["tallrec", "loracocktail"],
    "MoLoRec": ["tallrec", "loracocktail", "molorec"],
    "WeaveRec": ["tallrec", "weaverec"],
}
LORA = {"prompt", "top_k_target", "train_samples", "train_positions", "lora_epochs", "lora_batch_size", "lora_learning_rate"}
LORA |= {"lr_scheduler_type", "r", "lora_alpha", "target_modules", "lora_valid", "held_out", "lora_eval_steps", "lora_patience"}
MERGE = {"merge", "merge_start", "merge_granularity", "merge_first_tokens", "merge_prompts", "merge_split", "general_positions"}
REQUIRED = {  # keys without which a page would not be the paper's recipe
    "TALLRec": LORA,
    "LoRACocktail": LORA | MERGE,
    "MoLoRec": LORA | MERGE | {"merge_titles", "merge_learning_rate"},
    "WeaveRec": LORA | {"merge", "weave_samples"},
    "LlamaRec": LORA - {"prompt", "top_k_target", "held_out"}
    | {"labelled_prompt", "warmup_steps", "load_in_4bit", "max_history"},
    "ALLMRec": {
        "soft_prompt",
        "title_quote",
        "user_before_bos",
        "text_fields",
        "stage1_epochs",
        "stage2_epochs",
        "alpha",
        "beta",
    },
    "Laser": {"prompt", "cf_model", "laser_batch_size", "laser_optimizer", "lr_scheduler_type", "phase1_epochs", "phase2_epochs"},
    "AlphaRec": {"hidden_multiplier", "eval_step", "stopping_step", "learning_rate", "num_negatives"},
}


class Row(NamedTuple):
    """A setting: its published value or, where that is no value of the key, our default; and the source."""

    key: str
    value: Any
    source: str


def value_of(text: str) -> Any:
    """A value as a property file has it; ``1e-4`` is a number."""
    return yaml.load(text, Loader=Config._build_yaml_loader(None))


def rows(page: str, after: str = "## Settings of the paper") -> Iterator[Row]:
    text = (DOCS / f"{page}.md").read_text().split(after)[1]
    lines = iter(text[text.index(HEADER) :].splitlines()[2:])
    for line in lines:
        if not line.startswith("|"):
            return
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        assert len(cells) == 5, line
        _, key, published, source, ours = cells
        value = re.fullmatch(r"`(.*)`", published) or re.match(r"default `([^`]*)`", ours)
        assert value, f"{page}: {line} has neither a published value nor a default"
        assert source, f"{page}: {line} has no source"
        yield Row(key.strip("`"), value_of(value[1]), source)


def recipe(model: str) -> dict[str, Any]:
    return {row.key: row.value for page in PAGES.get(model, [model.lower()]) for row in rows(page)}


def setting(config: LLMConfig, key: str) -> Any:
    """The value of ``key``, or of the inner key ``outer.inner``."""
    outer, *inner = key.split(".")
    return reduce(lambda value, name: value[name], inner, config[outer])


# what the file of a backbone may set: what it is, and what fits into memory
ABOUT_BACKBONES = {
    "llm_path",
    "llm_revision",
    "dtype",
    "device_map",
    "attn_implementation",
    "load_in_4bit",
    "chat",
    "max_prompt_tokens",
    "score_batch_tokens",
}
# what it may set for one model alone
FOR_ONE_MODEL = {"load_in_4bit"}


def composed(model: str, llm: str | None) -> LLMConfig:
    return LLMConfig(model, "tiny", config_dict={"llm": llm} if llm else {"llm_path": "a-folder"})


def tiny_stand_in(llm: str, tiny_lm: Path) -> dict[str, Any]:
    """Settings under which a run with ``--llm=<llm>`` has that file's configuration on the weights of ``tiny_lm``, which are
    small and have room for 512 tokens: what fits into memory and a second is set, the recipe's kind of prompt is not.

    For tests that run every model with every file, as ``pytest.mark.parametrize("llm", LLMS)``.
    """
    return {
        "llm": llm,
        "llm_path": str(tiny_lm),
        "chat": False,  # the tiny tokenizer has no chat template
        "max_history": 3,
        "max_title_tokens": 16,
        "max_prompt_tokens": 448,
        "score_batch_tokens": None,
        "lora_batch_size": 4,
        "lora_epochs": 1,
        "train_samples": 8,
        "valid_users": 10,
        "lora_eval_steps": None,
        "load_in_4bit": False,
        "general_samples": 8,
        "general_epochs": 1,
        "merge_learning_rate": 0.1,
        "merge_titles": 2,
        "weave_controls": [],
        "domain_max_views": 2,
        "stage1_epochs": 1,
        "stage1_samples": 32,
        "stage2_epochs": 1,
        "joint_size": 16,
        "num_experts": 3,
        "prefix_length": 2,
        "m_former_hidden_size": 16,
        "m_former_num_layers": 2,
        "m_former_num_heads": 2,
        "phase1_epochs": 1,
        "phase2_epochs": 1,
        "merge_prompts": 8,
        "merge_steps": 2,
        "merge_points": 3,
        "domain_min_users": 5,
        "builtin_text_encoder": {"dim": 16, "vocab_size": 300},
        "cf_config": {"epochs": 1, "train_batch_size": 64, "hidden_size": 16, "inner_size": 32, "n_heads": 2},
    }


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_table_with_what_makes_its_recipe(model: str) -> None:
    assert REQUIRED[model] <= recipe(model).keys()


@pytest.mark.parametrize("llm", REAL)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_its_papers_settings_on_every_backbone(model: str, llm: str) -> None:
    config, expected = composed(model, llm), recipe(model)
    assert {key: setting(config, key) for key in expected} == expected


@pytest.mark.parametrize("llm", REAL)
def test_tallrecs_own_form_has_its_papers_settings(llm: str) -> None:
    config = LLMConfig("TALLRec", "ml-100k", ["properties/tallrec/yes-no.yaml"], {"llm": llm})
    expected = {row.key: row.value for row in rows("tallrec", after="## The original form: Yes or No")}
    assert {key: setting(config, key) for key in expected} == expected and len(expected) > 15


@pytest.mark.parametrize("llm", REAL)
@pytest.mark.parametrize("model", MODELS)
def test_a_backbone_changes_nothing_of_a_recipe(model: str, llm: str) -> None:
    own, plain = composed(model, llm).plain(), composed(model, None).plain()
    changed = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)} - {"llm"}
    assert changed <= ABOUT_BACKBONES


@pytest.mark.parametrize("llm", REAL)
def test_files_of_backbones_say_what_a_backbone_is(llm: str) -> None:
    assert FILES.read(f"llm/{llm}").keys() <= ABOUT_BACKBONES
    for model in FILES.names(f"llm/{llm}"):
        assert model in MODELS and FILES.read(f"llm/{llm}/{model}").keys() <= FOR_ONE_MODEL


ONE = "qwen2-7b"  # runs for all real backbones, which differ in nothing on the same tiny weights
FAST = {(ONE, model) for model in ("LlamaRec", "ALLMRec")}


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_llm_has_a_stand_in(model: str, llm: str, tmp_path: Path) -> None:
    config = LLMConfig(model, "tiny", config_dict=tiny_stand_in(llm, tmp_path))
    assert (config["llm"], config["llm_path"]) == (llm, str(tmp_path))
    assert config["prompt"] == composed(model, llm)["prompt"]
    if llm in REAL:
        one = LLMConfig(model, "tiny", config_dict=tiny_stand_in(ONE, tmp_path))
        assert config.plain() | {"llm": ONE} == one.plain()


@pytest.mark.parametrize(
    "llm, model",
    [
        pytest.param(llm, model, marks=[] if (llm, model) in FAST else pytest.mark.slow)
        for llm in (ONE, "smollm2-135m")  # the builtin one is run by the contract tests
        for model in MODELS
        if model != "AlphaRec"
    ],
)
def test_a_recipe_runs_on_tiny_weights(llm: str, model: str, data_path: Path, tiny_lm: Path, tmp_path: Path) -> None:
    own = {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved"), "show_progress": False, "epochs": 1}
    own |= {"category_field": "genre", "year_field": "year", "candidates": {"num_negatives": 9}}
    result = run_recbole_llm(model, "tiny", config_dict={**tiny_stand_in(llm, tiny_lm), **own})
    assert all(0 <= value <= 1 for value in result["test_result"].values())
    if model in ("LoRACocktail", "MoLoRec") and llm in REAL:
        assert "lattice, candidate entropy" in result["variants"]  # ours, beside the published merge


@pytest.mark.parametrize("model", [name for name in MODELS if name != "AlphaRec"])  # which reads no LLM
@pytest.mark.parametrize("llm", OWN)
def test_backbones_for_two_cores_have_their_own_training_settings(model: str, llm: str) -> None:
    """Their files stand over the recipe, and change nothing else of it."""
    own, plain = composed(model, llm).plain(), composed(model, None).plain()
    named = FILES.read(f"llm/{llm}", f"llm/{llm}/{model}")
    assert FILES.merge(own, named) == own
    assert {key for key in own if own[key] != plain.get(key)} - {"llm"} <= named.keys()
    assert "train_samples" in named or "stage2_epochs" in named


@pytest.mark.parametrize("model", [name for name in MODELS if name != "AlphaRec"])
@pytest.mark.parametrize("llm", OWN)
def test_the_warm_up_of_a_shorter_training_ends_before_it(model: str, llm: str) -> None:
    config = composed(model, llm)
    steps = (config["train_samples"] or 1000) // config["lora_batch_size"] * config["lora_epochs"]
    assert config["warmup_steps"] is None or config["warmup_steps"] < steps / 2
