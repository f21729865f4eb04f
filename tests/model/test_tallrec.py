"""TALLRec: one adapter on the target, beside the LM without it."""

import json
from pathlib import Path

import pytest

from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture(scope="module")
def record(module_settings):
    result = run_recbole_llm("TALLRec", "tiny", config_dict=module_settings)
    return json.loads(Path(result["record"]).read_text())


def test_the_lm_without_its_adapter_is_the_control(record):
    assert list(record["results"]) == ["TALLRec", "no adapter"]
    assert record["ranks"]["TALLRec"] != record["ranks"]["no adapter"]
    assert list(record["stage_seconds"]) == ["ingredient"]


def test_its_adapter_is_the_ingredient_of_the_cocktail(record, module_settings):
    result = run_recbole_llm("LoRACocktail", "tiny", config_dict={**module_settings, "merge": "uniform"})
    cocktail = json.loads(Path(result["record"]).read_text())
    assert cocktail["stage_seconds"]["ingredient"] == 0.0  # trained once, for both
    assert cocktail["ranks"]["ingredient"] == record["ranks"]["TALLRec"]


@pytest.mark.slow
@pytest.mark.parametrize("target", [1, 3])
def test_several_titles_can_be_the_training_answer(module_settings, target):
    changes = {"prompt": "listwise", "lora_train_mode": "prefix", "train_samples": 16, "lora_epochs": 1}
    changes["top_k_target"] = target
    result = run_recbole_llm("TALLRec", "tiny", config_dict={**module_settings, **changes})
    assert 0 <= result["test_result"]["hit@1"] <= 1
