"""The rules by validation and the report of a lattice in a run: what they measure, once for all, and that they read no test."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.report import draw_merge
from recbole_llm.model.merges import report as merge_report
from recbole_llm.model.merges import stages as merged
from recbole_llm.model.merges.labelled_users import LabelledUsers
from recbole_llm.model.merges.report import MergeReport, module_groups, module_points
from recbole_llm.model.merges.scored_users import ScoredUsers
from recbole_llm.store.code import _closure
from recbole_llm.store.stages import Work, in_order

MEASURED = {"merge": "entropy", "merge_prompts": 20, "merge_steps": 0}  # the users of the report
RULES = {
    "calibrated": {"merge": "calibrated_entropy"},
    "agreeing": {"merge": "agreement"},
    "likeliest": {"merge": "likelihood", "merge_granularity": "module", "merge_shrinkage": 0.1},
    "best": {"merge": "grid"},
    "entropy": MEASURED,
    "entropy of tokens": {**MEASURED, "merge_first_tokens": 3},
}
CHANGES = {"merge": "auto", "merge_report": True, "merge_beside": RULES}
LATTICE = "cocktail-lattice-3"


def stages_of(run):
    return {stage.name: stage for stage in in_order(run.trainer._stages)}


@pytest.fixture(scope="module")
def made(module_settings, assemble):
    """A trained cocktail with all rules and the report. ``scored``: what was scored, by whom and at which weights."""
    scored, scores = [], ScoredUsers.scores

    def listed(self, weights):
        scored.append((type(self), weights.flatten().tolist()))
        return scores(self, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoredUsers, "scores", listed)
        made = assemble("LoRACocktail", module_settings, **CHANGES)
        made.trainer.fit(made.train, made.valid)
    made.scored, made.stages = scored, stages_of(made)
    made.traces = {row: trace(made.trainer.cache.folder(stage)) for row, stage in made.model.merge_rows.stages.items()}
    return made


@pytest.fixture(scope="module")
def fresh(module_settings, assemble, made):
    """The same run, without adapters in its LM."""
    return assemble("LoRACocktail", module_settings, **CHANGES)


def trace(folder):
    return json.loads((folder / "merged" / "merge.json").read_text())["trace"]


# -- the lattice -------------------------------------------------------------------------------------------------------


def test_the_lattice_is_scored_once_for_all_rules_and_the_report(made):
    assert [weights for kind, weights in made.scored if kind is ScoredUsers] == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert [kind for kind, _ in made.scored].count(LabelledUsers) == 1  # what auto found on one half is no point of the lattice
    scores = load_file(made.trainer.cache.folder(made.stages[LATTICE]) / "scores.safetensors")["scores"]
    assert scores.shape == (3, 20, 10) and len(scores.flatten(1).unique(dim=0)) == 3
    readers = {name for name, stage in made.stages.items() if made.stages[LATTICE] in stage.inputs}
    assert readers == {"cocktail", "cocktail-report", *(f"cocktail-{row}" for row in [*RULES][:4])}


def test_rules_and_report_find_what_they_find_when_they_score_it_themselves(made, fresh, tmp_path, monkeypatch):
    for module in (merged, merge_report):
        monkeypatch.setattr(module, "read_scores", lambda *_: None)
    for row in ("merged", *[*RULES][:4]):
        work = Work(tmp_path / row, tmp_path, fresh.trainer.cache)
        work.out.mkdir()
        fresh.model.merge_rows.stages[row].build(work)
        live, known = trace(work.out), made.traces[row]
        if row != "likeliest":
            assert live == known, row
            continue
        for own, other in zip(live, known, strict=True):  # by module, weights are summed in another order
            assert own["phase"] == other["phase"] and own["loss"] == pytest.approx(other["loss"], rel=1e-4)
    fresh.model.measures_merges.build(Work(tmp_path, tmp_path, fresh.trainer.cache))
    assert json.loads((tmp_path / "merge_report.json").read_text()) == made.model.merge_report["report"]


def test_only_what_changes_scores_makes_the_lattice_anew(module_settings, assemble, made):
    def stages(**changes):
        return stages_of(assemble("LoRACocktail", module_settings, **changes))

    def same(found, name):
        return name in found and found[name].fingerprint == made.stages[name].fingerprint

    later = stages(merge="grid", merge_granularity="module", merge_shrinkage=1.0, merge_steps=5, score_batch_tokens=99)
    assert same(later, LATTICE) and later["cocktail"].inputs[-1] is later[LATTICE] and "cocktail-report" not in later
    reported = stages(merge="uniform", merge_report=True, merge_steps=5, score_batch_tokens=99)
    assert same(reported, LATTICE) and same(reported, "cocktail-report")
    assert all(made.stages[name].fingerprint == stage.fingerprint for name, stage in reported.items() if name != "cocktail")
    assert LATTICE not in stages(merge="uniform") and LATTICE not in stages(merge="grid", merge_points=5)
    for changes in ({"merge_first_tokens": 2}, {"merge_granularity": "module"}):
        found = stages(merge_report=True, **changes)
        assert same(found, LATTICE) and not same(found, "cocktail-report"), changes
    for changes in ({"valid_users": 10}, {"lora_epochs": 3}, {"normalize": "mean"}):
        found = stages(merge_report=True, **changes)
        assert not same(found, LATTICE) and not same(found, "cocktail-report"), changes


def test_the_code_of_the_lattice_is_that_of_scores_and_of_no_rule():
    found = {name.removeprefix("recbole_llm.") for name in _closure("recbole_llm.model.merges.lattice_scores")}
    assert {"model.merges.scored_users", "llm.likelihood", "llm.scoring", "llm.folding", "merging.points"} <= found
    assert {name for name in found if name.startswith("merging.")} == {"merging.points"}
    assert not {"model.merges.stages", "model.merges.labelled_users", "model.merges.report"} & found


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_of_a_run(made, tmp_path):
    report = made.model.merge_report["report"]
    assert report["users"] == 20 and report["metric"] == "ndcg@5" and report["modules"] is None
    assert [point["phase"] for point in report["lattice"]["points"]] == ["uniform", "single", "single"]
    assert list(report["lattice"]["points"][0]["weights"].values()) == [0.5, 0.5]
    for point in report["lattice"]["points"]:
        assert point["interval"][0] <= point["score"] <= point["interval"][1]
    for name in ("base spirit", "ingredient"):
        own = report["adapters"][name]
        assert 0 < own["calibration_error"] < 1 and own["temperature"] > 0
        assert own["calibrated"]["cross_entropy"] <= own["cross_entropy"]
    lines = [line for line in draw_merge(tmp_path, made.model.merge_report) if line.startswith("merge report, ")]
    assert (tmp_path / "merge_report.png").stat().st_size > 10_000
    assert [line.split()[2] for line in lines] == ["first_tokens_entropy", "candidate_entropy", "base", "ingredient:"]


def test_it_measures_what_the_methods_measure(made):
    """Entropies and score of a point are those that ``entropy`` and ``grid`` compute at the same weights, of the same users."""
    for place, point in enumerate(made.model.merge_report["report"]["lattice"]["points"]):
        assert point["score"] == pytest.approx(made.traces["best"][place]["score"], abs=1e-6)
        assert point["candidate_entropy"] == pytest.approx(made.traces["entropy"][place]["entropy"], rel=1e-3)
        assert point["first_tokens_entropy"] == pytest.approx(made.traces["entropy of tokens"][place]["entropy"], rel=1e-3)


def test_by_module_each_group_takes_each_adapter_in_turn(made, module_settings, assemble):
    run = assemble(
        "LoRACocktail", module_settings, merge_report=True, merge_points=7, merge="uniform", merge_granularity="module"
    )
    report = json.loads((run.trainer.cache.run(run.model.measures_merges) / "merge_report.json").read_text())
    swept = report["modules"]
    assert [point["phase"] for point in swept["points"]] == ["uniform", "single", "single", *["modules"] * 4]
    assert len(swept["groups"]) == 2 and set(swept["criteria"]) >= {"first_tokens_entropy", "candidate_entropy"}
    assert len(report["lattice"]["points"]) == 7


def test_groups_of_modules_are_within_the_points():
    assert module_groups(14, 2, 11) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]
    assert module_groups(3, 2, 99) == [[0], [1], [2]] and module_groups(3, 4, 2) == [[0, 1, 2]]
    problem = MergeProblem(["a", "b"], ["m0", "m1", "m2"], "module")
    points = module_points(problem, [[0, 1], [2]])
    assert len(points) == 3 + 2 * 2
    assert torch.equal(points[3][1], torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_the_report_and_the_rules_read_no_test_labels(made, fresh, tmp_path):
    test, sources = fresh.candidates["test"], fresh.model.sources
    wrong = {**fresh.candidates, "test": replace(test, targets=test.items[:, 3])}
    assert (wrong["test"].targets != test.targets).any()
    stages = fresh.model.merging.stages("cocktail", sources, wrong)
    stages["report"] = MergeReport(fresh.model.merging).stage("cocktail", sources, wrong)
    before = {**made.model.merge_rows.stages, "report": made.model.measures_merges}
    assert {row: stage.fingerprint for row, stage in stages.items()} == {row: stage.fingerprint for row, stage in before.items()}
    work = Work(tmp_path, tmp_path, fresh.trainer.cache)
    stages["report"].build(work)
    assert json.loads((tmp_path / "merge_report.json").read_text()) == made.model.merge_report["report"]
    stages["merged"].build(work)
    assert trace(tmp_path) == made.traces["merged"]


def test_validation_labels_do_change_what_the_rules_choose_by(made, fresh):
    """The counterpart: were labels not read at all, the test above could not fail."""
    valid = fresh.candidates["valid"]
    wrong = {**fresh.candidates, "valid": replace(valid, targets=valid.items[:, 3], identity="wrong")}
    stage = fresh.model.merging.stages("cocktail", fresh.model.sources, wrong)["likeliest"]
    found = trace(fresh.trainer.cache.run(stage))
    assert [point["loss"] for point in found] != [point["loss"] for point in made.traces["likeliest"]]


def test_rules_are_rows_of_one_table_and_auto_keeps_its_word(made):
    assert set(RULES) < set(made.model.variants())
    verdict = made.traces["merged"][-1]
    chosen, single = list(made.model.merge_report["weights"].values()), verdict["better_single"]
    assert verdict["phase"] == "confirm" and single in ("base spirit", "ingredient")
    assert chosen == (verdict["weights"] if verdict["taken"] else [float(single == "base spirit"), float(single == "ingredient")])
