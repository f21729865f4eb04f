"""MoLoRec mixes in every module by weights of its own."""

import json
from pathlib import Path

import pytest

from recbole_llm.llm.lora import load_adapters, lora_modules
from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture(scope="module")
def made(module_settings, assemble):
    made = assemble("MoLoRec", module_settings, merge_learning_rate=1.0)
    made.trainer.fit(made.train, made.valid)
    return made


def test_each_module_has_weights_of_its_own_that_sum_to_one(made, tiny_lm):
    from transformers import AutoModelForCausalLM

    adapted = load_adapters(AutoModelForCausalLM.from_pretrained(tiny_lm), made.model.adapters(made.trainer.cache))
    report = made.model.merge_report
    assert report["granularity"] == "module" and report["method"] == "entropy"
    assert list(report["weights"]) == list(lora_modules(adapted))
    assert all(list(pair) == ["base spirit", "ingredient"] for pair in report["weights"].values())
    moved = [point for point in report["trace"] if point["phase"] == "adam"]
    assert len({tuple(pair) for pair in moved[-1]["weights"]}) > 1  # the search takes the modules apart
    assert all(sum(pair) == pytest.approx(1) for pair in moved[-1]["weights"])


def test_its_defaults_are_those_of_the_authors_code(assemble, module_settings):
    plain = {key: value for key, value in module_settings.items() if not key.startswith(("merge", "top_k"))}
    model = assemble("MoLoRec", plain).model
    settings = model.merging.settings
    assert (settings.granularity, settings.first_tokens, settings.titles, settings.prompts) == ("module", 3, 5, 100)
    assert settings.options["start"] == "uniform" and len(settings.options["lr"]) == 10
    assert list(model.merging.others) == ["lattice, candidate entropy"]
    assert model.parts.examples.top_k_target == 5


@pytest.mark.slow
def test_a_second_run_reuses_every_stage_and_gives_the_same_result(made, module_settings):
    settings = {**module_settings, "merge_learning_rate": 1.0}
    results = [run_recbole_llm("MoLoRec", "tiny", config_dict=settings) for _ in range(2)]
    assert results[0]["test_result"] == results[1]["test_result"]
    record = json.loads(Path(results[1]["record"]).read_text())
    assert set(record["stage_seconds"].values()) == {0.0}
    assert set(record["results"]) == {"MoLoRec", "uniform mix", "base spirit", "ingredient", "no adapter"}
