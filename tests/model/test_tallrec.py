"""TALLRec: one adapter on the target, beside the LM without it."""

import json
from pathlib import Path

import pytest
import torch

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


def test_the_title_probe_gives_every_item_anothers_title_in_histories_and_candidates(assemble, module_settings, monkeypatch):
    model = assemble("TALLRec", module_settings, shuffled_title_control=True).model
    seen = {}

    def score(lm, prompts, answers, soft):
        seen.update(prompts=prompts, answers=answers)
        return torch.zeros(len(answers), len(answers[0]))

    monkeypatch.setattr(model, "scorer", score)
    items = list(range(1, model.n_items))

    def asked():
        model.score_histories([[1, 2, 3], []], torch.tensor([items, items]))
        return [tuple(answer) for answer in seen["answers"][0]], seen["prompts"]

    own, own_prompts = asked()
    with model.answer_with_shuffled_titles():
        others, prompts = asked()
        name = model.answering
    assert sorted(others) == sorted(own) and not any(a == b for a, b in zip(own, others, strict=True))
    bearer = [own.index(title) + 1 for title in others]  # of whose title each item has
    assert prompts[0] == model.prompts.prompt([bearer[0], bearer[1], bearer[2]], bearer)
    assert name != model.answering and asked() == (own, own_prompts), "afterwards all is as before"


def test_the_title_probe_is_two_rows_more_and_leaves_the_others_as_they_are(record, module_settings):
    result = run_recbole_llm("TALLRec", "tiny", config_dict={**module_settings, "shuffled_title_control": True})
    probed = json.loads(Path(result["record"]).read_text())
    assert list(probed["results"]) == ["TALLRec", "no adapter", "shuffled titles", "no adapter, shuffled titles"]
    assert {name: probed["ranks"][name] for name in record["ranks"]} == record["ranks"]
    assert probed["ranks"]["shuffled titles"] not in (probed["ranks"]["TALLRec"], probed["ranks"]["no adapter, shuffled titles"])
    assert probed["fingerprint"] != record["fingerprint"]
