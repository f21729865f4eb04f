"""The report of a lattice in a run: what it measures, and that it changes no merge."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.model.merge_report import MergeReport, module_groups, module_points
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.stages import Work, in_order


@pytest.fixture(scope="module")
def made(module_settings, assemble):
    """A trained cocktail with its report."""
    made = assemble("LoRACocktail", module_settings, merge_report=True)
    made.trainer.fit(made.train, made.valid)
    return made


@pytest.fixture
def run(module_settings, made):
    def run(**changes):
        result = run_recbole_llm("LoRACocktail", "tiny", config_dict={**module_settings, **changes})
        return result, json.loads(Path(result["record"]).read_text())

    return run


def test_the_report_is_in_the_record_and_changes_neither_weights_nor_the_merge(run, caplog):
    with_report, record = run(merge_report=True)
    without, plain = run()
    report = record["merge"].pop("report")
    assert record["merge"] == plain["merge"] and with_report["variants"] == without["variants"]
    assert plain["stages"]["cocktail"] == record["stages"]["cocktail"] and "cocktail-report" not in plain["stages"]
    assert report["users"] == 20 and report["metric"] == "ndcg@5" and report["modules"] is None
    assert [point["phase"] for point in report["lattice"]["points"]] == ["uniform", "single", "single"]
    assert list(report["lattice"]["points"][0]["weights"].values()) == [0.5, 0.5]
    for point in report["lattice"]["points"]:
        assert point["interval"][0] <= point["score"] <= point["interval"][1]
    for name in ("base spirit", "ingredient"):
        own = report["adapters"][name]
        assert 0 < own["calibration_error"] < 1 and own["temperature"] > 0
        assert own["calibrated"]["cross_entropy"] <= own["cross_entropy"]
    folder = Path(with_report["record"]).parent
    assert (folder / "merge_report.png").stat().st_size > 10_000
    lines = [message for message in caplog.messages if message.startswith("merge report, ")]
    assert [line.split()[2] for line in lines] == ["first_tokens_entropy", "candidate_entropy", "base", "ingredient:"]


def test_it_measures_what_the_methods_measure(run):
    """Entropy and score of a point are those that ``entropy`` and ``grid`` compute at the same weights, of the same users."""
    _, record = run(merge_report=True)
    points = record["merge"]["report"]["lattice"]["points"]
    changes = {"merge_prompts": 20, "merge_steps": 0}
    _, grid = run(merge="grid", **changes)
    _, tokens = run(merge="entropy", merge_first_tokens=3, **changes)
    for place, point in enumerate(points):
        assert point["score"] == pytest.approx(grid["merge"]["trace"][place]["score"], abs=1e-6)
        assert point["candidate_entropy"] == pytest.approx(grid["merge"]["trace"][place]["entropy"], rel=1e-3)
        assert point["first_tokens_entropy"] == pytest.approx(tokens["merge"]["trace"][place]["entropy"], rel=1e-3)


def test_by_module_each_group_takes_each_adapter_in_turn(run):
    _, record = run(merge_report=True, merge_points=7, merge="uniform", merge_granularity="module")
    swept = record["merge"]["report"]["modules"]
    assert [point["phase"] for point in swept["points"]] == ["uniform", "single", "single", *["modules"] * 4]
    assert len(swept["groups"]) == 2 and set(swept["criteria"]) >= {"first_tokens_entropy", "candidate_entropy"}
    assert len(record["merge"]["report"]["lattice"]["points"]) == 7


def test_groups_of_modules_are_within_the_points():
    assert module_groups(14, 2, 11) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]
    assert module_groups(3, 2, 99) == [[0], [1], [2]] and module_groups(3, 4, 2) == [[0, 1, 2]]
    problem = MergeProblem(["a", "b"], ["m0", "m1", "m2"], "module")
    points = module_points(problem, [[0, 1], [2]])
    assert len(points) == 3 + 2 * 2
    assert torch.equal(points[3][1], torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]))


def test_the_report_reads_no_test_labels(made, tmp_path, module_settings, assemble):
    test = made.candidates["test"]
    wrong = replace(test, targets=test.items[:, 3])
    assert (wrong.targets != test.targets).any()
    fresh = assemble("LoRACocktail", module_settings, merge_report=True)  # no adapters are loaded yet
    reports, sources = MergeReport(fresh.model.merging), fresh.model.sources
    stages = [reports.stage("cocktail", sources, {**made.candidates, "test": found}) for found in (test, wrong)]
    assert stages[0].fingerprint == stages[1].fingerprint == made.model.measures_merges.fingerprint
    stages[1].build(Work(tmp_path, tmp_path, fresh.trainer.cache))
    cached = made.trainer.cache.folder(made.model.measures_merges) / "merge_report.json"
    assert (tmp_path / "merge_report.json").read_text() == cached.read_text()


def test_only_what_it_measures_makes_it_anew(module_settings, assemble):
    def stages(**changes):
        trainer = assemble("LoRACocktail", module_settings, merge_report=True, **changes).trainer
        return {stage.name: stage.fingerprint for stage in in_order(trainer._stages)}

    before = stages()
    for changes in ({"merge": "uniform"}, {"merge_steps": 5}, {"score_batch_tokens": 99}):
        assert stages(**changes)["cocktail-report"] == before["cocktail-report"], changes
    for changes in ({"merge_points": 5}, {"valid_users": 10}, {"merge_first_tokens": 2}, {"merge_granularity": "module"}):
        assert stages(**changes)["cocktail-report"] != before["cocktail-report"], changes


RULES = {
    "calibrated": {"merge": "calibrated_entropy"},
    "agreeing": {"merge": "agreement"},
    "likeliest": {"merge": "likelihood", "merge_granularity": "module", "merge_shrinkage": 0.1},
    "best": {"merge": "grid"},
}


def test_rules_are_rows_of_one_table_and_read_no_test_labels(run, module_settings, assemble, tmp_path):
    result, record = run(merge="auto", merge_beside=RULES)
    assert set(RULES) < set(result["variants"])
    verdict = record["merge"]["trace"][-1]
    chosen, single = list(record["merge"]["weights"].values()), verdict["better_single"]
    assert verdict["phase"] == "confirm" and single in ("base spirit", "ingredient")
    assert chosen == (verdict["weights"] if verdict["taken"] else [float(single == "base spirit"), float(single == "ingredient")])
    fresh = assemble("LoRACocktail", module_settings, merge="auto", merge_beside=RULES)
    test = fresh.candidates["test"]
    wrong = {**fresh.candidates, "test": replace(test, targets=test.items[:, 3])}
    before, after = (fresh.model.merging.stages("cocktail", fresh.model.sources, found) for found in (fresh.candidates, wrong))
    assert {row: stage.fingerprint for row, stage in before.items()} == {row: stage.fingerprint for row, stage in after.items()}
    after["merged"].build(Work(tmp_path, tmp_path, fresh.trainer.cache))
    made_anew = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert made_anew["trace"] == record["merge"]["trace"]


def test_validation_labels_do_change_what_the_rules_choose_by(module_settings, assemble, made, tmp_path):
    """The counterpart: were labels not read at all, the test above could not fail."""
    fresh = assemble("LoRACocktail", module_settings, merge="likelihood")
    valid = fresh.candidates["valid"]
    wrong = {**fresh.candidates, "valid": replace(valid, targets=valid.items[:, 3])}
    found = []
    for place, candidates in enumerate((fresh.candidates, wrong)):
        out = tmp_path / str(place)
        out.mkdir()
        stage = fresh.model.merging.stage("cocktail", fresh.model.sources, candidates)
        stage.build(Work(out, out, fresh.trainer.cache))
        found.append(json.loads((out / "merged" / "merge.json").read_text())["trace"])
    assert [point["loss"] for point in found[0]] != [point["loss"] for point in found[1]]
