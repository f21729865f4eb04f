"""Placebo rows: something that has learnt nothing of use in place of every adapter but the target's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.merging.arithmetic import MERGE_FILE
from recbole_llm.model.adapters import AdapterTraining
from recbole_llm.model.merges.title_overlap import title_overlap
from recbole_llm.planner import plan_of
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.stages import Stage, in_order

KINDS = ["shuffled", "random", "zero"]
LABELS = ["shuffled domain", "random LoRA", "zero LoRA"]
WEIGHTS = {"base spirit": 0.3, "ingredient": 0.7}
CHANGES = {"domain_max_views": 1, "lora_epochs": 2, "general_epochs": 2, "merge": "fixed", "merge_weights": WEIGHTS}
ROWS = [f"placebo: {label}{how}" for label in LABELS for how in ("", ", uniform")]


@pytest.fixture(scope="module")
def made(module_settings: dict[str, Any], assemble: Any) -> Any:
    """A trained cocktail with all placebos; ``folders`` are those of the stages by name."""
    made = assemble("LoRACocktail", module_settings, placebos=KINDS, **CHANGES)
    made.trainer.fit(made.train, made.valid)
    made.by_name = {stage.name: stage for stage in in_order(made.trainer._stages)}
    made.folders = {name: made.trainer.cache.folder(stage) for name, stage in made.by_name.items()}
    return made


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Module -> dW."""
    return {module: b @ a for module in adapter.modules for a, b in [adapter.factors(module)]}


def planned(assemble: Any, settings: dict[str, Any], model: str = "LoRACocktail", **changes: Any) -> dict[str, Stage]:
    run = assemble(model, settings, **changes)
    return {stage.name: stage for stage in in_order(run.trainer.plan(run.candidates))}


# -- rows and stages ---------------------------------------------------------------------------------------------------


def test_the_rows_stand_after_the_mixtures_and_each_scores_differently(made: Any) -> None:
    interaction, _, _, targets = next(iter(made.test))
    listed = made.test.candidates.lookup(interaction["user_id"], targets)[:5]
    with torch.no_grad():
        scores = {name: row.score(interaction[:5], listed) for name, row in made.model.variants().items()}
    assert list(scores) == ["LoRACocktail", "uniform mix", *ROWS, "base spirit", "ingredient", "no adapter"]
    assert len({tuple(found.flatten().tolist()) for found in scores.values()}) == len(scores)


def test_a_placebo_is_merged_in_place_of_the_base_spirit_with_its_weight(made: Any) -> None:
    """Random and zero adapters by hand, from dense matrices."""
    ingredient = dense(read_adapter(made.folders["ingredient"]))
    for kind, label in zip(KINDS, LABELS, strict=True):
        name = "base-spirit-shuffled" if kind == "shuffled" else f"{kind}-lora-base-spirit"
        placebo = dense(read_adapter(made.folders[name]))
        for suffix, weights in (("", (0.3, 0.7)), ("-uniform", (0.5, 0.5))):
            folder = made.folders[f"cocktail-placebo-{kind}{suffix}"] / "merged"
            merged = dense(read_adapter(folder))
            for module, delta in merged.items():
                expected = weights[0] * placebo[module] + weights[1] * ingredient[module]
                torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
            named = json.loads((folder / MERGE_FILE).read_text())["weights"]
            assert list(named) == [f"{label} for base spirit", "ingredient"]
            assert [*named.values()] == pytest.approx(list(weights))


def test_the_random_adapter_has_the_norms_of_the_base_spirit(made: Any) -> None:
    names = "base-spirit", "random-lora-base-spirit", "zero-lora-base-spirit"
    base, drawn, zero = (dense(read_adapter(made.folders[name])) for name in names)
    for module, delta in base.items():
        assert float(drawn[module].norm()) == pytest.approx(float(delta.norm()), rel=1e-5) and delta.any()
        assert not zero[module].any()


def test_placebos_change_no_other_stage_and_the_seed_changes_the_draw(
    made: Any, module_settings: dict[str, Any], assemble: Any
) -> None:
    plain = planned(assemble, module_settings, **CHANGES)
    assert {name: stage.fingerprint for name, stage in plain.items()}.items() <= {
        name: stage.fingerprint for name, stage in made.by_name.items()
    }.items()
    assert made.by_name.keys() - plain.keys() == {
        *("base-spirit-shuffled", "random-lora-base-spirit", "zero-lora-base-spirit"),
        *(f"cocktail-placebo-{kind}{how}" for kind in KINDS for how in ("", "-uniform")),
    }
    again = planned(assemble, module_settings, placebos=KINDS[1:], **CHANGES)
    assert {stage.fingerprint for stage in again.values()} < {stage.fingerprint for stage in made.by_name.values()}


def test_the_plan_counts_them_and_a_second_run_computes_nothing(
    made: Any, module_settings: dict[str, Any], assemble: Any
) -> None:
    changes = {"placebos": KINDS, **CHANGES}
    run = assemble("LoRACocktail", module_settings, **changes)
    plan = plan_of(run.trainer, run.stages, run.train, run.valid, run.test)
    assert {line.status for line in plan.lines if line.name in made.by_name} == {"cached"}
    rows = {"all": run, "none": assemble("LoRACocktail", module_settings, **{**changes, "placebos": []})}
    tested = {}
    for name, found in rows.items():
        lines = plan_of(found.trainer, found.stages, found.train, found.valid, found.test).lines
        tested[name] = next(line.cost.read.fed for line in lines if line.name == "test")
    assert tested["all"] / tested["none"] == pytest.approx(11 / 5, rel=0.01)
    fresh = assemble("LoRACocktail", {**module_settings, "checkpoint_dir": "elsewhere"}, **changes)
    costs = {line.name: line.cost for line in plan_of(fresh.trainer, fresh.stages, fresh.train, fresh.valid, fresh.test).lines}
    assert costs["base-spirit-shuffled"].trained.fed > 0 and costs["cocktail-placebo-random"].read.fed > 0
    assert costs["random-lora-base-spirit"].note == costs["cocktail-placebo-random-uniform"].note == "nothing is trained"
    run.trainer.fit(run.train, run.valid)
    assert not any(run.trainer.cache.seconds.values())


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["LoRACocktail", "WeaveRec"])
def test_the_shuffled_adapter_is_trained_alike_on_shuffled_histories_of_other_domains(
    model: str, settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, stage = {}, AdapterTraining.stage
    monkeypatch.setattr(AdapterTraining, "stage", lambda self, spec: seen.update({spec.name: spec}) or stage(self, spec))
    key = "general_datasets" if model == "LoRACocktail" else "source_datasets"
    planned(assemble, settings, model, placebos=["shuffled"], **{key: ["other"]})
    name = "base-spirit" if model == "LoRACocktail" else "lora-other+tiny"
    plain, placebo = seen[name], seen[f"{name}-shuffled"]
    assert (plain.training, plain.of_each, plain.most, plain.valid) == (
        *(placebo.training, placebo.of_each, placebo.most, placebo.valid),
    )
    for before, after in zip(plain.sources, placebo.sources, strict=True):
        same = [np.array_equal(*pair) for pair in zip(before.histories, after.histories, strict=True)]
        assert before.name == after.name and before.items is after.items
        assert all(same) if before.name == "tiny" else not all(same)
        assert Counter(np.concatenate(before.histories)) == Counter(np.concatenate(after.histories))
        assert [*map(len, before.histories)] == [*map(len, after.histories)]


def test_the_overlap_counts_words_of_titles_in_training_histories(assemble: Any, settings: dict[str, Any]) -> None:
    domain = assemble("LoRACocktail", settings).model.parts.domain
    names = ["", "The Red river", "the red-river", "Blue", "unseen"]
    one, two = (
        replace(domain, items=replace(domain.items, titles=names), histories=[np.array(items)]) for items in ([1, 2], [1, 3])
    )
    assert title_overlap([one], [two]) == 3 / 4 and title_overlap([one], [one]) == 1  # the red river, blue
    assert title_overlap([replace(one, histories=[])], [replace(two, histories=[])]) is None


# -- models and errors -------------------------------------------------------------------------------------------------


def test_a_weave_replaces_every_hybrid_and_is_uniform_by_itself(settings: dict[str, Any], assemble: Any) -> None:
    found = planned(assemble, settings, "WeaveRec", placebos=["random"], weave_controls=[], domain_min_users=5)
    own = [name for name in found if "random" in name]
    views = [name for name in found if name.startswith("lora-tiny+")]
    assert len(views) == 2 and own == [
        *(f"random-lora-hybrid-tiny-{view.split('-')[-1]}" for view in views),
        "weave-placebo-random",
    ]
    draws = [found[name].depends["seed"] for name in own[:2]]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("LoRACocktail", {"placebos": ["noise"]}, r"placebos: \['noise'\] in .* is not a list of strings of shuffled, r"),
        ("LoRACocktail", {"placebos": ["zero"], "merge_beside": {ROWS[4]: {"merge": "uniform"}}}, "is the name of a row of plac"),
        ("WeaveRec", {"placebos": ["zero"], "weave": "target_only"}, "placebos: weave merges 'target only', but placebos need"),
        ("WeaveRec", {"placebos": ["random"], "weave": "data_merging"}, "merges 'data merging', but placebos need 'target only'"),
    ],
)
def test_a_placebo_that_cannot_be_is_refused(
    model: str, changes: dict[str, Any], message: str, settings: dict[str, Any], assemble: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        planned(assemble, settings, model, **changes)


def test_a_given_base_spirit_has_a_random_placebo_and_no_shuffled_one(
    made: Any, module_settings: dict[str, Any], assemble: Callable[..., Any]
) -> None:
    given = {"adapters": {"base spirit": str(made.folders["base-spirit"])}}
    found = planned(assemble, module_settings, placebos=["random"], **given)
    assert found["random-lora-base-spirit"].inputs[0].name == "given-base-spirit"
    with pytest.raises(ValueError, match="adapters gives that adapter without its data; leave shuffled out"):
        planned(assemble, module_settings, placebos=["shuffled"], **given)


def test_the_rows_are_in_the_record(made: Any, module_settings: dict[str, Any]) -> None:
    result = run_recbole_llm("LoRACocktail", "tiny", config_dict={**module_settings, **CHANGES, "placebos": KINDS[1:]})
    record = json.loads(Path(result["record"]).read_text())
    assert {*ROWS[2:]} < record["results"].keys() and len(record["ranks"][ROWS[2]]) == 60
    assert record["trained_parameters"] == made.trainer.trained_parameters
    (pair,) = record["merge"]["pairs"]
    assert pair["adapters"] == ["base spirit", "ingredient"] and -1 <= pair["cosine"] <= 1 and pair["entropy_gap"] is not None
    domains = made.model.general, [made.model.parts.domain]
    assert pair["title_words"] == title_overlap(*domains) and 0.5 < pair["title_words"] <= 1
