"""The papers' recipes: what each model is set to on each real backbone, held against what was published.

A backbone's file (``properties/llm``) says what the backbone is; it must change nothing of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.config.property_files import PropertyFiles, merge, properties_folder

FILES = PropertyFiles(properties_folder())
LLMS = FILES.names("llm")
REAL = [name for name in LLMS if name != "builtin"]


@dataclass(frozen=True)
class Recipe:
    """Settings of a paper.

    Attributes:
        source: paper and section, or the authors' code where the paper does not say.
        values: as published.
        ours: where this package differs on purpose, with the reason in the model's documentation.
    """

    source: str
    values: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)


# arXiv 2502.08271 v2, settings of the experiments; scripts/train_*.sh of the authors' code for examples, epochs and evaluation
# steps (the best checkpoint is used, training does not stop early); defaults of LLaMA-Factory 0.9.1 where both are silent
RECCOCKTAIL = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "use_rslora": False,
    "train_samples": 30_000,
    "lora_epochs": 4,
    "lora_batch_size": 128,
    "lora_learning_rate": 2e-4,
    "warmup_ratio": 0.05,
    "lora_eval_steps": 30,
    "lora_patience": 0,
    "lora_train_mode": "prefix",
    "prompt": "listwise",
    "scorer": "tree",
    "system": "You are a helpful recommendation assistant.",
}
SEPARATORS = {"history_separator": " || ", "candidate_separator": " || "}  # "||" without blanks in the authors' code

RECIPES = {
    "TALLRec": Recipe(
        "arXiv 2502.08271 v2, baselines: RecCocktail's prompt and LoRA, on the target alone", RECCOCKTAIL, SEPARATORS
    ),
    "LoRACocktail": Recipe(
        "arXiv 2502.08271 v2, settings of the experiments; equations (6) to (9) for the mixture",
        {**RECCOCKTAIL, "domain_max_views": 8, "merge_prompts": 50, "merge_granularity": "global", "merge": "entropy"},
        {**SEPARATORS, "top_k_target": 1, "merge_split": "valid", "merge_first_tokens": 0},
    ),
    "MoLoRec": Recipe(
        "arXiv 2502.08271 v1; data/data_process.py and src/mlora3 of the authors' code",
        {
            **RECCOCKTAIL,
            "top_k_target": 5,
            "merge": "entropy",
            "merge_granularity": "module",
            "merge_prompts": 100,
            "merge_first_tokens": 3,
        },
        {**SEPARATORS, "merge_split": "valid"},
    ),
    "WeaveRec": Recipe(
        "arXiv 2510.26546; scripts/train_lora.sh, traindata/combine.py and result/change_weights.py of the authors' code",
        {
            **RECCOCKTAIL,
            "train_samples": 40_000,
            "lora_epochs": 2,
            "weave": "hybrid",
            "merge": "uniform",
            "domain_max_views": 3,
        },
        {**SEPARATORS, "top_k_target": 1},
    ),
    "LlamaRec": Recipe(
        "arXiv 2311.02089; the authors' code",
        {
            "scorer": "label",
            "r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"],
            "train_samples": None,
            "lora_epochs": 1,
            "lora_batch_size": 16,
            "lora_learning_rate": 1e-4,
            "lora_eval_steps": 100,
            "lora_patience": 20,
            "lora_train_mode": "prefix",
            "max_history": 20,
            "max_title_tokens": 32,
            "max_prompt_tokens": 1536,
            "system": None,
        },
    ),
    "ALLMRec": Recipe(
        "arXiv 2404.11343 v2, settings of the experiments and Table 3",
        {
            "soft_prompt": "allmrec",
            "history_separator": '", "',
            "candidate_separator": '", "',
            "system": None,
            "max_history": 10,
            "cf_model": "SASRec",
            "joint_size": 128,
            "alpha": 0.5,
            "logits": "sum",
            "match_negatives": False,
            "tune_text_encoder": True,
            "stage1_samples": None,
            "stage1_epochs": 10,
            "stage1_batch_size": 32,
            "stage1_learning_rate": 1e-4,
            "train_samples": None,
            "all_positions": False,
            "stage2_epochs": 5,
            "stage2_batch_size": 4,
            "stage2_learning_rate": 1e-4,
        },
    ),
    "Laser": Recipe(
        "arXiv 2409.01605 v1, settings of the experiments, Tables 2 and 7",
        {
            "prompt": "laser",
            "history_label": ">> {k}. ",
            "history_separator": "\n",
            "system": None,
            "max_history": 10,
            "metrics": ["Recall", "NDCG", "MRR"],
            "topk": [10],
            "candidate_phases": [],
            "num_experts": 8,
            "prefix_length": 32,
            "pooling": "suffix",
            "m_former_hidden_size": 768,
            "m_former_num_layers": 12,
            "m_former_num_heads": 12,
            "temperature": 0.05,
            "load_balance_weight": 0.01,
            "train_samples": None,
            "warmup_epochs": 0,
            "phase1_epochs": 15,
            "phase1_learning_rate": 1e-4,
            "phase2_epochs": 5,
            "phase2_learning_rate": 1e-4,
        },
        {"cf_model": "SASRec", "laser_batch_size": 32},  # BERT4Rec and 4 in the paper
    ),
    "AlphaRec": Recipe(
        "arXiv 2407.05441; the authors' code",
        {
            "embedding_size": 64,
            "n_layers": 2,
            "hidden_multiplier": 0.5,
            "temperature": 0.15,
            "num_negatives": 256,
            "learning_rate": 5e-4,
            "train_batch_size": 4096,
            "stopping_step": 20,
        },
    ),
}
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
FOR_ONE_MODEL: set[str] = set()


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
        "max_history": 5,
        "max_title_tokens": 16,
        "max_prompt_tokens": 448,
        "score_batch_tokens": None,
        "lora_batch_size": 8,
        "lora_epochs": 1,
        "train_samples": 32,
        "valid_users": 20,
        "lora_eval_steps": None,
        "stage1_epochs": 1,
        "stage1_samples": 64,
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


def test_every_model_has_a_recipe() -> None:
    assert RECIPES.keys() == registry.MODELS.keys()


@pytest.mark.parametrize("llm", [*REAL, None])
@pytest.mark.parametrize("model", RECIPES)
def test_a_model_has_its_papers_settings_on_every_backbone(model: str, llm: str | None) -> None:
    recipe, config = RECIPES[model], composed(model, llm)
    expected = recipe.values | recipe.ours
    assert {key: config[key] for key in expected} == expected, recipe.source


@pytest.mark.parametrize("llm", REAL)
@pytest.mark.parametrize("model", RECIPES)
def test_a_backbone_changes_nothing_of_a_recipe(model: str, llm: str) -> None:
    own, plain = composed(model, llm).plain(), composed(model, None).plain()
    changed = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)} - {"llm"}
    assert changed <= ABOUT_BACKBONES


@pytest.mark.parametrize("llm", REAL)
def test_files_of_backbones_say_what_a_backbone_is(llm: str) -> None:
    assert FILES.read(f"llm/{llm}").keys() <= ABOUT_BACKBONES
    for model in FILES.names(f"llm/{llm}"):
        assert model in registry.MODELS and FILES.read(f"llm/{llm}/{model}").keys() <= FOR_ONE_MODEL


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("model", RECIPES)
def test_every_llm_has_a_stand_in(model: str, llm: str, tmp_path: Path) -> None:
    config = LLMConfig(model, "tiny", config_dict=tiny_stand_in(llm, tmp_path))
    assert (config["llm"], config["llm_path"]) == (llm, str(tmp_path))
    assert config["prompt"] == composed(model, llm)["prompt"]


@pytest.mark.parametrize("model", [name for name in RECIPES if name != "AlphaRec"])  # which reads no LLM
def test_the_builtin_lm_has_its_own_training_settings(model: str) -> None:
    """Its files stand over the recipe, and change nothing else of it."""
    own, plain = composed(model, "builtin").plain(), composed(model, None).plain()
    named = FILES.read("llm/builtin", f"llm/builtin/{model}")
    assert merge(own, named) == own
    assert {key for key in own if own[key] != plain.get(key)} - {"llm"} <= named.keys()
    assert {"train_samples", "lora_epochs", "lora_learning_rate", "max_prompt_tokens"} <= named.keys()
