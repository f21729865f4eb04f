"""TALLRec: one adapter on the target, beside the LM without it."""

import json
from pathlib import Path

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture(scope="module")
def record(module_settings):
    result = run_recbole_llm("TALLRec", "tiny", config_dict=module_settings)
    return json.loads(Path(result["record"]).read_text())


def test_the_lm_without_its_adapter_stands_beside_the_model(record):
    assert list(record["results"]) == ["TALLRec", "no adapter"]
    assert record["ranks"]["TALLRec"] != record["ranks"]["no adapter"]
    assert list(record["stage_seconds"]) == ["ingredient"]


def test_its_adapter_is_the_ingredient_of_the_cocktail(record, module_settings):
    result = run_recbole_llm("LoRACocktail", "tiny", config_dict={**module_settings, "merge": "uniform"})
    cocktail = json.loads(Path(result["record"]).read_text())
    assert cocktail["stage_seconds"]["ingredient"] == 0.0  # trained once, for both
    assert cocktail["ranks"]["ingredient"] == record["ranks"]["TALLRec"]


def test_a_second_fit_of_the_same_trainer_trains_nothing_and_gives_the_same_scores(record, module_settings, assemble, recwarn):
    made, scores = assemble("TALLRec", module_settings), []
    batch = next(iter(made.test))
    candidates = made.test.candidates.lookup(batch[0]["user_id"], batch[3])[:5]
    for _ in range(2):
        made.trainer.fit(made.train, made.valid)
        with torch.no_grad():
            scores.append([variant.score(batch[0][:5], candidates) for variant in made.model.variants().values()])
    assert made.trainer.cache.seconds == {"ingredient": 0.0}
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]  # adapters on top of adapters
    assert all(torch.equal(one, other) for one, other in zip(*scores, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", [1, 3])
def test_several_titles_can_be_the_training_answer(module_settings, target):
    changes = {"prompt": "listwise", "lora_train_mode": "prefix", "train_samples": 16, "lora_epochs": 1}
    changes["top_k_target"] = target
    result = run_recbole_llm("TALLRec", "tiny", config_dict={**module_settings, **changes})
    assert 0 <= result["test_result"]["hit@1"] <= 1


def test_the_shuffled_title_control_shows_every_item_under_anothers_title(assemble, module_settings, record):
    """In histories and candidates alike: to the LM, an item is the one whose title it has."""
    made = assemble("TALLRec", module_settings, shuffled_title_control=True)
    made.trainer.fit(made.train, made.valid)
    names, shuffled = made.model.parts.domain.items.names, made.model.parts.shuffled_names()
    assert sorted(shuffled) == sorted(names) and shuffled[0] == names[0]
    assert not any(one == other for one, other in zip(names[1:], shuffled[1:], strict=True))
    bearer = torch.tensor([names.index(title) for title in shuffled])  # [I]: of whose title each item has
    batch = next(iter(made.test))
    interaction, candidates = batch[0][:5], made.test.candidates.lookup(batch[0]["user_id"], batch[3])[:5]
    renamed = Interaction({**interaction.interaction, "item_id_list": bearer[interaction["item_id_list"]]})
    variants = made.model.variants()
    with torch.no_grad():
        for row, own in (("shuffled titles", "TALLRec"), ("no adapter, shuffled titles", "no adapter")):
            found = variants[row].score(interaction, candidates)
            torch.testing.assert_close(found, variants[own].score(renamed, bearer[candidates]), atol=1e-4, rtol=0)
            assert not torch.allclose(found, variants[own].score(interaction, candidates), atol=1e-2)


def test_memorisation_is_measured_once_for_a_backbone_and_a_dataset(record, module_settings, caplog):
    given = {**module_settings, "memorisation": True}
    result = run_recbole_llm("TALLRec", "tiny", config_dict=given)
    with_it = json.loads(Path(result["record"]).read_text())
    assert with_it["memorisation"]["lines"]["number"] > 0 and 0 <= with_it["memorisation"]["lines"]["share"] <= 1
    assert "memorisation: the next line" in caplog.text and with_it["stage_seconds"]["memorisation"] > 0
    assert with_it["results"] == record["results"] and record["memorisation"] is None
    again = run_recbole_llm("TALLRec", "tiny", config_dict={**given, "lora_learning_rate": 2e-3})
    other = json.loads(Path(again["record"]).read_text())
    assert other["stage_seconds"]["memorisation"] == 0 and other["memorisation"] == with_it["memorisation"]


def test_the_shuffled_title_control_adds_two_rows_and_changes_no_other(record, module_settings):
    result = run_recbole_llm("TALLRec", "tiny", config_dict={**module_settings, "shuffled_title_control": True})
    controlled = json.loads(Path(result["record"]).read_text())
    assert list(controlled["results"]) == ["TALLRec", "no adapter", "shuffled titles", "no adapter, shuffled titles"]
    assert {name: controlled["ranks"][name] for name in record["ranks"]} == record["ranks"]
    assert controlled["ranks"]["shuffled titles"] not in (
        controlled["ranks"]["TALLRec"],
        controlled["ranks"]["no adapter, shuffled titles"],
    )
    assert controlled["fingerprint"] != record["fingerprint"]
