"""MoLoRec mixes in every module by weights of its own."""

import pytest

from recbole_llm.llm.lora import load_adapters, lora_modules


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
