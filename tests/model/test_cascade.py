"""Cascade: routes users to an LLM by a rule from validation users, and answers the others as its collaborative model does."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.model import cascade
from recbole_llm.model.cascade import routing
from recbole_llm.planner import TEST, VALIDATION, plan_of
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store import code
from recbole_llm.store.costs import metered
from recbole_llm.store.processes import Processes
from recbole_llm.store.stages import in_order
from tests.conftest import assembled, dealt_anew

FULL = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "retriever_top": 6, "retriever_config": {"epochs": 1}}


@pytest.fixture(scope="module")
def settings(module_settings: dict[str, Any]) -> dict[str, Any]:
    return {**module_settings, "llm_ranker": "TALLRec", "lora_epochs": 1}


def trained(settings: dict[str, Any], **changes: Any) -> SimpleNamespace:
    made = assembled("Cascade", settings, **changes)
    made.trainer.fit(made.train, made.valid)
    return made


@pytest.fixture(scope="module")
def made(settings: dict[str, Any]) -> SimpleNamespace:
    return trained(settings)


def routing_some(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with a rule that routes about half of the users, and nothing in memory of what the LLM was asked before."""
    model = made.model
    interaction, _, _, targets = next(iter(made.test))
    candidates = made.test.candidates.lookup(interaction["user_id"], targets)
    known = model.models.features(interaction, candidates, model.models.cheap_scores(interaction, candidates))
    rule = replace(model.choice.rule, feature="entropy", high=True, threshold=float(np.median(known["entropy"])), share=0.1)
    monkeypatch.setattr(model, "choice", replace(model.choice, rule=rule))
    monkeypatch.setattr(model.models, "_asked", {})
    return interaction, candidates, rule(known)


@torch.no_grad()
def test_routed_users_have_the_llms_scores_and_the_others_the_cheap_models(
    made: SimpleNamespace, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interaction, candidates, routed = routing_some(made, monkeypatch)
    assert 0 < routed.mean() < 1
    rows = {name: variant.score(interaction, candidates) for name, variant in made.model.variants().items()}
    assert list(rows) == ["Cascade", "SASRec", "TALLRec", "random routing"]
    where = torch.from_numpy(routed)
    assert torch.equal(rows["Cascade"][where], rows["TALLRec"][where])
    assert torch.equal(rows["Cascade"][~where], rows["SASRec"][~where])
    listed = [(rows, items) for rows, items, _ in made.model.models.batches("test")]
    known = [made.model.models.features(*batch, made.model.models.cheap_scores(*batch)) for batch in listed]
    share = np.concatenate([made.model.choice.rule(features) for features in known]).mean()  # of the test users
    assert 0.2 < share < 0.8 and share != made.model.choice.rule.share == 0.1
    at_random = torch.from_numpy(made.model.lots[interaction["user_id"].numpy()] < share)
    assert torch.equal(rows["random routing"], torch.where(at_random[:, None], rows["TALLRec"], rows["SASRec"]))
    plain = assembled("TALLRec", settings)
    plain.trainer.fit(plain.train, plain.valid)
    assert not any(plain.trainer.cache.seconds.values())  # its stages are the cascade's
    torch.testing.assert_close(plain.model.score_candidates(interaction, candidates), rows["TALLRec"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_llm_is_asked_for_routed_users_alone_and_once(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    interaction, candidates, routed = routing_some(made, monkeypatch)
    model, asked = made.model, []
    score = model.llm.score_candidates
    monkeypatch.setattr(
        model.llm, "score_candidates", lambda rows, items: asked.append(rows["user_id"].tolist()) or score(rows, items)
    )
    model.score_candidates(interaction, candidates)
    assert asked == [interaction["user_id"][torch.from_numpy(routed)].tolist()]
    for variant in model.variants().values():
        variant.score(interaction, candidates)
    assert sorted(user for batch in asked for user in batch) == sorted(interaction["user_id"].tolist())


@torch.no_grad()
def test_histories_of_one_length_have_scores_of_their_own(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of two people outside the data set, or a long one at validation and at test, once it is cut."""
    routing_some(made, monkeypatch)
    model, histories = made.model, torch.tensor([[3, 5, 8], [9, 2, 4]])
    fields = {"user_id": torch.zeros(2, dtype=torch.long), "item_id_list": histories, "item_length": torch.tensor([3, 3])}
    interaction, candidates = Interaction(fields), torch.tensor([[6, 7, 10]]).repeat(2, 1)
    expected = model.llm.score_candidates(interaction, candidates)
    assert not torch.equal(*expected)
    torch.testing.assert_close(model.models.llm_scores(interaction, candidates), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.models.llm_scores(interaction[1:], candidates[1:]), expected[1:], atol=1e-4, rtol=0)


def test_cpu_seconds_of_one_of_several_processes_are_not_those_of_the_run(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.model.cpu_seconds is not None
    monkeypatch.setattr(cascade, "current", lambda: Processes(rank=0, size=2))
    assert made.model.cpu_seconds is None


def test_the_record_has_the_rule_the_curve_and_its_files(settings: dict[str, Any]) -> None:
    result = run_recbole_llm("Cascade", "tiny", config_dict=settings)
    record = json.loads(Path(result["record"]).read_text())
    found, results = record["routing"], record["results"]
    points = found["curve"]["points"]
    assert found["curve"]["metric"] == "hit@1" and found["choice"]["users"] == 60
    assert points[0]["value"] == pytest.approx(results["SASRec"]["hit@1"], abs=1e-8)
    assert points[-1]["value"] == pytest.approx(results["TALLRec"]["hit@1"], abs=1e-8)
    assert points[-1]["cpu_seconds"] > points[0]["cpu_seconds"] > 0 and {*found["users_per_second"]} == {"cheap", "llm"}
    ranks = {row: np.array([*by_user.values()]) for row, by_user in record["ranks"].items()}
    best = np.minimum(ranks["SASRec"], ranks["TALLRec"])
    assert found["curve"]["oracle"]["value"] == pytest.approx((best == 1).mean())
    assert {"routing.csv", "routing.png"} <= {file.name for file in Path(result["record"]).parent.iterdir()}
    assert list(results) == ["Cascade", "SASRec", "TALLRec", "random routing"], "the oracle is no row"


def test_no_test_target_touches_rule_or_routing(settings: dict[str, Any], tmp_path: Path) -> None:
    """With the test targets dealt out anew among the users, the validation gains and the routed users stay the same."""
    data = tmp_path / "data"
    shutil.copytree(settings["data_path"], data)
    file = data / "tiny" / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    targets = {user: item for user, item, _ in rows}  # of each user the last one
    file.write_text("\n".join([header, *("\t".join(row) for row in dealt_anew(rows, targets)), ""]))
    # a fixed cheap model: RecBole numbers items by the whole data set, so its training would start from other weights
    given = {**settings, "checkpoint_dir": str(tmp_path / "saved"), "cheap_model": "Pop"}
    del given["cheap_config"]
    one, two = trained(given), trained({**given, "data_path": str(data), "checkpoint_dir": str(tmp_path / "other")})
    before, after = (made.test._dataset.histories for made in (one, two))
    changed = sum(
        before.item_ids[before.target(user, "test")] != after.item_ids[after.target(user, "test")] for user in range(1, 61)
    )
    assert changed > 40
    assert one.model.choice == two.model.choice

    def popularity(made: SimpleNamespace) -> dict[str, float]:
        models, found = made.model.models, {}
        for interaction, candidates, _ in models.batches("test"):
            values = models.features(interaction, candidates, models.cheap_scores(interaction, candidates))["history_popularity"]
            found |= zip([models.histories.user_ids[user] for user in interaction["user_id"].tolist()], values, strict=True)
        return found

    assert popularity(one) == popularity(two)  # of the history, in which no test target is; listed candidates contain it


@torch.no_grad()
def test_the_target_that_an_interaction_of_recbole_carries_is_not_read(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    interaction, candidates, routed = routing_some(made, monkeypatch)
    scores = made.model.score_candidates(interaction, candidates)
    made.model.models._asked.clear()
    other = Interaction(dict(interaction.interaction) | {"item_id": interaction["item_id"].flip(0)})
    assert not torch.equal(other["item_id"], interaction["item_id"]) and 0 < routed.mean() < 1
    assert torch.equal(made.model.score_candidates(other, candidates), scores)


@torch.no_grad()
def test_a_cheap_model_may_exclude_items(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a score of minus infinity; no feature of the user and no fused score is then NaN."""
    models = made.model.models
    interaction, candidates, _ = next(iter(models.batches("test")))
    own = models.cf.candidate_scores
    monkeypatch.setattr(models.cf, "candidate_scores", lambda *given: own(*given).index_fill(1, torch.tensor([0, 3]), -torch.inf))
    scores = models.cheap_scores(interaction, candidates)
    known = models.features(interaction, candidates, scores)
    assert all(np.isfinite(values).all() for values in known.values())
    for kind in ("z_score", "reciprocal_rank"):
        assert torch.isfinite(routing.fused(kind, scores, torch.zeros_like(scores), 0.5)).all()


def test_a_fusion_has_a_row_of_its_own(settings: dict[str, Any]) -> None:
    result = run_recbole_llm("Cascade", "tiny", config_dict={**settings, "routing_fusion": "z_score"})
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["Cascade", "SASRec", "TALLRec", "SASRec + TALLRec", "random routing"]
    last = record["routing"]["curve"]["points"][-1]
    assert last["value"] == pytest.approx(record["results"]["SASRec + TALLRec"]["hit@1"], abs=1e-8)
    assert record["routing"]["choice"]["rule"]["weight"] in (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def test_in_a_full_ranking_the_top_of_the_cheap_model_is_routed(settings: dict[str, Any]) -> None:
    made = trained({**settings, **FULL})
    model, (interaction, *_) = made.model, next(iter(made.test))
    assert model.llm.retriever is model.cf and model.choice.users == 60
    (own, candidates, _), *_ = model.models.batches("test", [1, 2, 3])
    assert candidates.shape == (3, 6)
    for row, user in zip(candidates.tolist(), own["user_id"].tolist(), strict=True):
        assert not {*row} & {*model.parts.histories.before(user, "test").tolist()}
    rows = {name: variant.score_catalogue(interaction) for name, variant in model.variants().items()}
    assert all(torch.equal(scores, rows["SASRec"]) for scores in rows.values())
    result = run_recbole_llm("Cascade", "tiny", config_dict={**settings, **FULL})
    record = json.loads(Path(result["record"]).read_text())
    points = record["routing"]["curve"]["points"]
    assert [points[0]["value"], points[-1]["value"]] == pytest.approx(
        [record["results"][row]["hit@1"] for row in ("SASRec", "TALLRec")], abs=1e-8
    )


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"routing_steps": 5}, {"routing"}),
        ({"routing_fusion": "z_score"}, {"routing"}),
        ({"routing_users": 30}, {"routing"}),
        ({"valid_metric": "MRR@5"}, {"routing", "ingredient"}),
        ({"cheap_model": "BPR", "cheap_config": {"epochs": 1}}, {"routing", "cf-BPR"}),
        ({"lora_epochs": 2}, {"routing", "ingredient"}),
        ({"score_batch_tokens": 64}, set()),
    ],
)
def test_a_setting_recomputes_what_reads_it(
    made: SimpleNamespace, settings: dict[str, Any], changes: dict[str, Any], again: set[str]
) -> None:
    before = {stage.folder_name for stage in in_order(made.stages)}
    stages = in_order(assembled("Cascade", settings, **changes).stages)
    assert {stage.name for stage in stages if stage.folder_name not in before} == again


def test_the_settings_are_those_of_the_contained_ranker_on_its_backbone() -> None:
    for ranker in ("LoRACocktail", "TALLRec", "MoLoRec"):
        own, plain = (LLMConfig(model, "tiny", config_dict={"llm_ranker": ranker}) for model in ("Cascade", ranker))
        differing = {key for key in plain.plain() if own[key] != plain[key]}
        assert (
            differing <= {"merge_beside", "weave_controls", "placebos", "merge_report", "model"} and own["llm_ranker"] == ranker
        )
    given = LLMConfig("Cascade", "tiny", config_dict={"merge_prompts": 7, "cf_model": "BPR"})
    assert [*given.unread] == ["cf_model"] and given["merge_prompts"] == 7


def test_a_ranker_of_the_user_brings_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from recbole_llm.model.tallrec import TALLRec\n\n\nclass OwnRanker(TALLRec):\n    pass\n")
    (tmp_path / "OwnRanker.yaml").write_text("extends: model/TALLRec\nboldness: 0.5  # (float) of the ranker\nlora_epochs: 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_own", {})
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    found = LLMConfig("Cascade", "tiny", config_dict={"llm_ranker": "mine:OwnRanker", "boldness": 0.25})
    assert (found["boldness"], found["lora_epochs"], found["cheap_model"], found.unread) == (0.25, 3, "SASRec", {})
    with pytest.raises(ValueError, match="boldness: 'much' in config_dict is not a number"):
        LLMConfig("Cascade", "tiny", config_dict={"llm_ranker": "mine:OwnRanker", "boldness": "much"})


def test_the_rule_is_chosen_anew_where_the_code_of_the_users_ranker_changes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "OwnRanker.yaml").write_text("extends: model/TALLRec\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for sign in ("", "-"):
        body = f"def _scored(self, *given):\n        return {sign}super()._scored(*given)"
        (tmp_path / "mine.py").write_text(
            f"from recbole_llm.model.tallrec import TALLRec\n\n\nclass OwnRanker(TALLRec):\n    {body}\n"
        )
        monkeypatch.setattr(registry, "_own", {})
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        code._tree.cache_clear()
        found.append(
            {stage.folder_name for stage in in_order(assembled("Cascade", settings, llm_ranker="mine:OwnRanker").stages)}
        )
    assert [name.rpartition("-")[0] for name in found[1] - found[0]] == ["routing"]


def test_the_plan_counts_both_parts(settings: dict[str, Any], tmp_path: Path) -> None:
    run = assembled("Cascade", settings, checkpoint_dir=str(tmp_path))
    plan = plan_of(run.trainer, run.stages, run.train, run.valid, run.test)
    lines = {line.name: line.cost for line in plan.lines}
    assert list(lines) == ["ingredient", "cf-SASRec", "routing", VALIDATION, TEST]
    run.trainer.fit(run.train, run.valid)
    with metered() as tested:
        for variant in run.trainer.recommender.variants().values():
            run.trainer.evaluate(run.test, load_best_model=False, variant=variant)
    measured = {**run.trainer.cache.measured, VALIDATION: run.trainer.validation, TEST: tested}
    for name in ("ingredient", "routing"):
        assert lines[name].read.fed == measured[name].read.fed > 0 and lines[name].exact
    assert lines["cf-SASRec"].samples and "RecBole's trainer" in lines["cf-SASRec"].note
    assert lines[VALIDATION].at_most and measured[VALIDATION].read.fed <= lines[VALIDATION].read.fed
    assert not lines[TEST].exact and lines[TEST].read.real == tested.read.real  # each user once, whatever the rule is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_ranker": "TALRec"}, "--llm_ranker=TALRec: no such model. Did you mean TALLRec"),
        ({"llm_ranker": "SASRec"}, "llm_ranker: SASRec does not rank candidates by an LLM"),
        ({"llm_ranker": "Laser"}, "llm_ranker: Laser does not rank candidates by an LLM"),
        ({"llm_ranker": "Cascade"}, "llm_ranker: Cascade does not rank candidates by an LLM"),
        ({"cheap_model": "TALLRec"}, "cheap_model: TALLRec is not a model of RecBole"),
        ({"cheap_checkpoint": "none.pth"}, "cheap_checkpoint: none.pth is not a file"),
        ({"routing_features": []}, "routing_features: an empty list"),
        ({"routing_features": ["luck"]}, "routing_features: .*is not a list of strings of history_length"),
        ({"eval_args": {"mode": "full"}}, "there are no candidates for valid"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        assembled("Cascade", settings, **changes)
