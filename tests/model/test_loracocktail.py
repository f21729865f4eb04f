"""Two adapters from one pre-trained LM, mixed without a label, written as one ordinary adapter."""

import json
import linecache
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.llm import finetune
from recbole_llm.llm.adapter_folders import WEIGHTS_FILE
from recbole_llm.llm.lora import AdapterView, load_adapters
from recbole_llm.model.loracocktail import LoRACocktail
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.recorded_stages import RecordedStages
from recbole_llm.store.stages import Work, in_order


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def made(module_settings, assemble) -> SimpleNamespace:
    """A trained cocktail; ``starts`` are the adapters and the base with which each training began."""
    made = assemble("LoRACocktail", module_settings)
    attach, made.starts = finetune.attach_lora, {}

    def spy(model, *, name, **recipe):
        base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        peft_model = attach(model, name=name, **recipe)
        named = peft_model.named_parameters()
        fresh = {key.replace(name, ""): tensor.detach().clone() for key, tensor in named if tensor.requires_grad}
        made.starts[name] = base, fresh
        return peft_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "attach_lora", spy)
        made.trainer.fit(made.train, made.valid)
    made.folders = made.model.adapters(made.trainer.cache)
    interaction, _, _, targets = next(iter(made.test))
    made.interaction = interaction[:5]
    made.listed = made.test.candidates.lookup(interaction["user_id"], targets)[:5]
    return made


@pytest.fixture
def run(module_settings, made):
    """Run on the stages that ``made`` has cached; returns the result and its record."""

    def run(model: str = "LoRACocktail", **changes):
        result = run_recbole_llm(model, "tiny", config_dict={**module_settings, **changes})
        return result, json.loads(Path(result["record"]).read_text())

    return run


# -- the three stages --------------------------------------------------------------------------------------------------


def test_base_spirit_and_ingredient_start_alike_from_the_pretrained_lm(made, tiny_lm):
    (base, fresh), (other_base, other_fresh) = made.starts["base-spirit"], made.starts["ingredient"]
    assert equal(fresh, other_fresh) and equal(base, other_base)
    pretrained = load_file(tiny_lm / "model.safetensors")
    assert set(pretrained) <= set(base) and all(torch.equal(base[key], tensor) for key, tensor in pretrained.items())
    trained = [adapter(made.folders[name]) for name in ("base spirit", "ingredient")]
    assert not equal(*trained)


def test_the_merged_adapter_scores_alike_in_vanilla_peft_and_as_the_live_mixture(made, tiny_lm):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_lm).eval()

    def scores(lm):
        return made.model.variant(likelihood.with_lm(lm)).score(made.interaction, made.listed)

    likelihood = made.model.parts.likelihood(made.model.parts.backbone.load(made.trainer.cache))
    weights = {name: torch.tensor(value) for name, value in made.model.merge_report["weights"].items()}
    with torch.no_grad():
        ours = made.model.score_candidates(made.interaction, made.listed)
        plain, vanilla = scores(base()), scores(PeftModel.from_pretrained(base(), str(made.folders["merged"])).eval())
        live = scores(AdapterView(load_adapters(base(), {name: made.folders[name] for name in weights}), weights))
    torch.testing.assert_close(ours, vanilla, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, live, atol=1e-3, rtol=0)
    assert (ours - plain).abs().max() > 0.1


def test_the_mixture_is_never_less_sure_than_the_uniform_one_or_a_single_adapter(made):
    trace = made.model.merge_report["trace"]
    chosen = next(p["entropy"] for p in trace if p["weights"] == list(made.model.merge_report["weights"].values()))
    assert {point["phase"] for point in trace} == {"uniform", "single", "adam"}  # merge_points: 3 are the first two
    assert chosen == min(point["entropy"] for point in trace)
    assert sum(made.model.merge_report["weights"].values()) == pytest.approx(1)


def test_the_weights_do_not_change_with_the_labels(made, tmp_path, module_settings, assemble):
    """Targets become any other candidate; the candidates, all that an unlabelled prompt may show, stay."""
    garbage = {}
    for phase, found in made.candidates.items():
        slots = (found.items == found.targets[:, None]).int().argmax(1)
        wrong = found.items.gather(1, ((slots + 3) % found.items.size(1))[:, None]).squeeze(1)
        assert (wrong != found.targets).all()
        garbage[phase] = replace(found, targets=wrong)
    fresh = assemble("LoRACocktail", module_settings)
    stage = fresh.model.merging.stage("cocktail", fresh.model.sources, garbage)
    stage.build(Work(tmp_path, tmp_path, fresh.trainer.cache))
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["trace"] == made.model.merge_report["trace"]
    assert equal(adapter(tmp_path / "merged"), adapter(made.folders["merged"]))


def test_every_variant_scores_differently(made):
    with torch.no_grad():
        scores = {name: variant.score(made.interaction, made.listed) for name, variant in made.model.variants().items()}
    assert list(scores) == ["LoRACocktail", "uniform mix", "base spirit", "ingredient", "no adapter"]
    distinct = {tuple(found.flatten().tolist()) for name, found in scores.items() if name != "LoRACocktail"}
    assert len(distinct) == 4


# -- the ways to mix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"merge": "uniform"}, [0.5, 0.5]),
        ({"merge": "fixed", "merge_weights": [0.2, 0.8]}, [0.2, 0.8]),
        ({"merge": "fixed", "merge_weights": [-0.5, 1.5], "merge_extrapolate": True}, [-0.5, 1.5]),
        ({"merge": "fixed", "merge_weights": {"ingredient": 1, "base spirit": 0}, "merge_compress_rank": 4}, [0, 1]),
        ({"merge": "grid", "merge_granularity": "module"}, None),
        ({"merge": "entropy", "merge_first_tokens": 2, "merge_split": "test"}, None),
    ],
    ids=lambda value: value["merge"] if isinstance(value, dict) else "",
)
def test_every_method_runs_on_the_cached_adapters(run, changes, weights):
    result, record = run(**changes)
    report = record["merge"]
    assert report["method"] == changes["merge"] and report["split"] == changes.get("merge_split", "valid")
    if weights:
        assert list(report["weights"].values()) == pytest.approx(weights)
    assert record["stage_seconds"]["ingredient"] == record["stage_seconds"]["base-spirit"] == 0  # cached
    uniform = set() if changes["merge"] == "uniform" else {"uniform mix"}  # which would be the same row twice
    assert set(result["variants"]) == {*uniform, "base spirit", "ingredient", "no adapter"}
    if weights == [0, 1]:
        assert record["ranks"]["ingredient"] == record["ranks"]["LoRACocktail"] and report["retained_energy"] > 0.9999


@pytest.mark.slow
def test_the_published_merge_and_ours_are_rows_of_one_table(run):
    changes = {"merge_start": "uniform", "merge_first_tokens": 2, "merge_steps": 3}
    result, record = run(**changes, merge_beside={"ours": {"merge_start": "lattice", "merge_first_tokens": 0}})
    assert list(result["variants"]) == ["uniform mix", "ours", "base spirit", "ingredient", "no adapter"]
    phases = [point["phase"] for point in record["merge"]["trace"]]
    assert phases == ["uniform", "single", "single", *["adam"] * 3, "end"]
    assert list(record["merge"]["weights"].values()) == pytest.approx(record["merge"]["trace"][-1]["weights"])
    alone, _ = run()  # the row beside it is what it would be as the model
    assert result["variants"]["ours"] == alone["test_result"]


def test_rows_whose_names_differ_in_signs_alone_are_found_in_a_record(module_settings, assemble, tmp_path):
    """Also where the code has changed since, and with it the fingerprints."""
    beside = {name: {"merge": "fixed", "merge_weights": weights} for name, weights in {"a b": [0, 1], "a-b": [1, 0]}.items()}
    beside["report"] = {"merge": "uniform"}
    made = assemble("LoRACocktail", module_settings, merge_beside=beside, merge_report=True)
    made.model.plan(made.candidates)
    stages = made.model.merge_rows.stages
    recorded, ran = {}, [stages["a b"], stages["a-b"], stages["report"], made.model.measures_merges]
    for number, stage in enumerate(ran):
        earlier = replace(stage, depends={"code": "of that day"})
        recorded[earlier.second_name if stage.name in recorded else stage.name] = f"folder-{number}"
    found = [RecordedStages(tmp_path, recorded=recorded).folder(stage).name for stage in ran]
    assert found == list(recorded.values()) == [f"folder-{number}" for number in range(4)]


def test_each_adapter_has_its_own_training_settings(module_settings, assemble):
    """RecCocktail: one example of each user, 2 epochs for the base spirit; these and others, 4 epochs for the ingredient."""
    changes = {"lora_train_mode": "prefix", "general_positions": "last", "general_samples": None, "general_epochs": 2}
    changes |= {"train_positions": "last_and_others", "train_samples": 30, "lora_epochs": 4, "lora_valid": "loss"}
    made = assemble("LoRACocktail", module_settings, **changes, held_out=0.1, general_held_out=0.02)
    specs, training = made.model.trained(made.candidates), made.model.adapter_training
    (base, base_held), (own, own_held) = (training.examples(spec) for spec in specs.values())
    users = [len(domain.histories) for domain in made.model.general]
    assert len(base) + len(base_held) == sum(users) and len(base_held) == max(1, sum(users) // 50)
    histories = made.model.parts.domain.histories
    trained = sum(len(history) > 1 for history in histories)
    assert len(own) + len(own_held) == trained + 30 and len(own_held) == (trained + 30) // 10
    assert [training._training(spec).epochs for spec in specs.values()] == [2, 4]
    assert all(spec.valid is None for spec in specs.values())  # the loss chooses


def test_what_does_not_change_an_adapter_or_a_merge_does_not_make_it_anew(module_settings, assemble):
    def stages(**changes):
        trainer = assemble("LoRACocktail", module_settings, **changes).trainer
        return {stage.name: stage.fingerprint for stage in in_order(trainer._stages)}

    before = stages()
    for key, value in {"score_batch_tokens": 99, "train_batch_tokens": 99, "gradient_checkpointing": True}.items():
        assert stages(**{key: value}) == before, key
    assert stages(held_out=0.3) == before  # lora_valid: ranking holds nothing out from the ingredient
    loss = stages(lora_valid="loss")
    assert loss["base-spirit"] == before["base-spirit"] and loss["ingredient"] != before["ingredient"]


@pytest.mark.slow
def test_a_function_of_the_users_merges_and_a_change_of_it_merges_again(run, tmp_path, monkeypatch):
    code = "import torch\nfrom recbole_llm.merging.coefficients import MergeResult\n\n\ndef mix(problem):\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    for weights in ([0.25, 0.75], [0.5, 0.5]):
        (tmp_path / "mine.py").write_text(f"{code}    return MergeResult(torch.tensor({weights}), [])\n")
        monkeypatch.delitem(sys.modules, "mine", raising=False)  # as in a new process
        linecache.clearcache()
        _, record = run(merge="mine:mix")
        assert list(record["merge"]["weights"].values()) == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": "entropi"}, "merge: 'entropi' is unknown; did you mean 'entropy'"),
        ({"merge_granularity": "layer"}, "merge_granularity: 'layer' in config_dict is not one of global, module"),
        ({"merge_start": "corner"}, "merge_start: 'corner' in config_dict is not one of lattice, uniform"),
        ({"merge_beside": {"x": {"r": 4}}}, "merge_beside: x changes r, which is not one of merge, "),
        (
            {"merge_beside": {"x": {"merge_stepz": 4}}},
            r"unknown key `merge_stepz` in merge_beside\['x'\] of .*; did you mean `merge_steps`",
        ),
        ({"merge_beside": {"x": {"merge_steps": "four"}}}, r"merge_steps: 'four' in merge_beside\['x'\] of config_dict is not a"),
        ({"merge_beside": {"x": None}}, "merge_beside: {'x': None} in .* is not a dictionary of dictionaries .*; change x: None"),
        (
            {"merge_beside": {"x": {"merge": "dare", "merge_residual": 0.3}}},
            "merge_beside: x changes merge_residual, which has no effect with merge: dare; it is read by orthogonal_residual",
        ),
        ({"merge_beside": {"lr 0.5": {"merge": "uniform"}}}, "merge_beside: 'lr 0.5' cannot name a row"),
        *(
            ({"merge_beside": {name: {"merge": "uniform"}}}, f"merge_beside: '{name}' cannot name a row, torch has a use for it")
            for name in ("values", "training", "_modules", "")
        ),
        ({"merge_beside": {"merged": {"merge": "uniform"}}}, "merge_beside: 'merged' is the name of a row or an adapter"),
        ({"merge_beside": {"ingredient": {"merge": "uniform"}}}, "merge_beside: 'ingredient' is the name of a row or an adapter"),
        ({"merge_beside": {"uniform mix": {"merge": "uniform"}}}, "merge_beside: 'uniform mix' is the name of a row or an"),
        ({"merge": "fixed", "merge_weights": [None, 1]}, r"merge_weights: \[None, 1\] in config_dict is not a list of numbers o"),
        (
            {"merge": "fixed", "merge_weights": {"ingredient": "all", "base spirit": 0}},
            "merge_weights: .* is not a list of numbers or a dictionary of numbers or ~; change ingredient: 'all'",
        ),
        ({"merge": "fixed"}, "merge_weights: give one weight for each of .*'base spirit', 'ingredient'"),
        ({"merge_beside": {"x": {"merge": "fixed", "merge_weights": [1, 2, 3]}}}, "merge_weights: give one weight for each of"),
        ({"merge_weights": [0.2, 0.8]}, r"merge_weights: \[0.2, 0.8\] has no effect with merge: .*; read by fixed"),
        ({"merge_density": 0.2}, r"merge_density: 0.2 has no effect with merge: .*; read by ties, dare"),
        (
            {"merge": "ties", "merge_residual": 0.2},
            "merge_residual: 0.2 has no effect with merge: ties; read by orthogonal",
        ),
        ({"merge_learning_rate": []}, r"merge_learning_rate: \[\] is no list of numbers"),
        ({"lora_dropout": 1.0}, r"lora_dropout: 1\.0 in config_dict is not a number in \[0, 1\)"),
        ({"lora_valid": "ndcg"}, "lora_valid: 'ndcg' in config_dict is not one of ranking, loss"),
        ({"train_positions": "last"}, "train_positions: last needs lora_train_mode: prefix"),
        (
            {"lr_scheduler_type": "step"},
            "lr_scheduler_type: 'step' in config_dict is not one of cosine, linear, constant_with_warmup, constant",
        ),
        ({"merge_split": "train"}, "merge_split: 'train' in config_dict is not one of valid, test"),
        ({"category_field": None}, "general_datasets: none given, and tiny has no category_field"),
        (
            {"domain_min_users": 1000},
            "no category of `genre` in tiny has 1000 users with two items, .* give --general_datasets=.* or a lower ",
        ),
        ({"general_datasets": ["nowhere"]}, "--dataset=nowhere"),
    ],
)
def test_mistakes_are_refused_before_anything_trains(module_settings, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        changes = {"checkpoint_dir": str(tmp_path), **changes}
        run_recbole_llm("LoRACocktail", "tiny", config_dict={**module_settings, **changes})
    assert not list(tmp_path.glob("stages/*-*"))


# -- domains -----------------------------------------------------------------------------------------------------------


def test_the_base_spirit_can_learn_from_another_dataset(run, made, caplog):
    _, record = run(general_datasets=["other"])
    assert record["stage_seconds"]["base-spirit"] > 0 and record["stage_seconds"]["ingredient"] == 0
    assert "domain other: reading" in caplog.messages
    assert record["ranks"]["ingredient"].keys() == record["ranks"]["LoRACocktail"].keys()


def test_test_labels_touch_no_adapter_and_no_weight(settings, data_path, tmp_path, made):
    """The same run on a file in which users exchange their test items: every result is bit-equal."""
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.item").write_text((data_path / "tiny" / "tiny.item").read_text())
    header, *lines = (data_path / "tiny" / "tiny.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    last = [row for row, following in zip(rows, [*rows[1:], [None]], strict=True) if row[0] != following[0]]
    known = {user: {row[1] for row in rows if row[0] == user} for user, *_ in last}
    for row, (_, item, _) in zip(last, [tuple(row) for row in last[1:] + last[:1]], strict=True):
        if item not in known[row[0]]:
            row[1] = item
    (folder / "tiny.inter").write_text("\n".join([header, *map("\t".join, rows)]) + "\n")

    changes = {"data_path": str(tmp_path / "data"), "checkpoint_dir": str(tmp_path / "saved")}
    result = run_recbole_llm("LoRACocktail", "tiny", config_dict={**settings, **changes})
    record = json.loads(Path(result["record"]).read_text())
    original = made.candidates["test"].sha256
    assert record["candidates_sha256"]["test"] != original  # the labels did change
    assert record["candidates_sha256"]["valid"] == made.candidates["valid"].sha256
    stages = (tmp_path / "saved" / "stages").glob("[!.]*")
    found = {path.name.rsplit("-", 1)[0]: path for path in stages}
    assert equal(adapter(found["ingredient"]), adapter(made.folders["ingredient"]))
    assert equal(adapter(found["base-spirit"]), adapter(made.folders["base spirit"]))
    assert equal(adapter(found["cocktail"] / "merged"), adapter(made.folders["merged"]))


@pytest.mark.parametrize("prompt", ["history", "listwise"])
def test_no_token_after_the_end_of_an_answer_counts(module_settings, assemble, prompt):
    """The answer to a bare list of titles ends with the separator of the history, other ones with EOS."""
    separators = {"history_separator": "; ", "candidate_separator": "\n", "lora_train_mode": "prefix"}
    made = assemble("LoRACocktail", module_settings, prompt=prompt, merge_first_tokens=50, **separators)
    causal = made.model.parts.backbone.load(made.trainer.cache)
    likelihood = made.model.parts.likelihood(causal)
    answer = likelihood.prompts.answers[1]
    found = made.model.merging.counted(likelihood).places([*answer, *answer], causal.tokenizer.eos_token_id)
    assert found == ([*range(len(answer))], True)


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"prompt": "listwise"}, {"scorer": "label"}], ids=["listwise", "label"])
def test_prompts_that_list_candidates_work_end_to_end(run, changes):
    result, record = run(lora_train_mode="prefix", train_samples=16, lora_epochs=1, **changes)
    assert 0 <= result["test_result"]["hit@1"] <= 1 and len(record["ranks"]["LoRACocktail"]) == 60
    assert record["tie_rate"]["LoRACocktail"] < 0.5


def test_the_model_is_what_the_contract_reads_off_its_class():
    assert LoRACocktail.uses_item_text and not LoRACocktail.uses_cf_model and LoRACocktail.scores_unseen_items
