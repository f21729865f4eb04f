"""The run record: strict JSON with all that a table, a test or a later run needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.classical.record_code import record_code
from recbole_llm.config import LLMConfig
from recbole_llm.data import loading
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.evaluation.recommender import ClassicalRecommender
from recbole_llm.evaluation.record import Row, table
from recbole_llm.llm.causal_lm import identity
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store import code
from recbole_llm.store.json_files import sealed
from recbole_llm.store.runs import SavedRun
from recbole_llm.store.stages import Stage, StageCache, Work

Run = Callable[..., Any]


def strict(path: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def half_width(ranks: dict[str, int], metric: Callable[[np.ndarray], np.ndarray]) -> float:
    return float(1.96 * metric(np.array(list(ranks.values()))).std() / np.sqrt(len(ranks)))


def test_a_record_holds_what_section_3_of_the_design_asks_for(run: Run) -> None:
    result, _ = run("BPR")
    record = strict(result["record"])
    assert record["results"]["BPR"] == pytest.approx(dict(result["test_result"]))
    assert record["half_width_95"]["BPR"].keys() == result["test_result"].keys()
    assert record["half_width_95"]["BPR"]["hit@1"] == pytest.approx(half_width(record["ranks"]["BPR"], lambda rank: rank == 1))
    assert record["half_width_95"]["BPR"]["mrr@5"] == pytest.approx(
        half_width(record["ranks"]["BPR"], lambda rank: (rank <= 5) / rank)
    )
    assert record["best_valid_result"] == pytest.approx(dict(result["best_valid_result"]))
    assert (record["model"], record["dataset"], record["seed"]) == ("BPR", "tiny", 2020)
    assert set(record["ranks"]["BPR"]) == {f"u{user}" for user in range(60)}  # tokens, not internal ids
    assert all(1 <= rank <= 10 for rank in record["ranks"]["BPR"].values())
    assert record["config"]["candidates"] == {"source": "uniform", "num_negatives": 9, "seed": 2020, "file": None}
    assert {len(record["candidates_sha256"][phase]) for phase in ("valid", "test")} == {64}
    assert {"recbole_llm", "python", "recbole", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["seconds"]["train"] > 0 and record["seconds"]["evaluate"] > 0
    assert record["peak_memory_bytes"] > 1e6 and record["written"].endswith("Z")
    assert record["stages"] == {} and record["backbone"] is None and len(record["fingerprint"]) == 64
    assert Path(result["record"]).parent.name == f"BPR-tiny-{record['fingerprint'][:8]}"


def test_a_record_of_an_llm_model_names_its_backbone_and_variants(run: Run) -> None:
    result, _ = run("TALLRec")
    record = strict(result["record"])
    assert "tiny-llama" in record["backbone"] and record["backbone_fingerprint"]
    assert record["backbone_identity"] == identity(record["config"]["llm_path"])
    assert list(record["results"]) == ["TALLRec", "no adapter"] == list(record["ranks"])
    assert record["stage_seconds"].keys() == {"ingredient"} == record["stages"].keys()
    assert (Path(result["record"]).parents[2] / "stages" / record["stages"]["ingredient"]).is_dir()
    assert result["variants"].keys() == {"no adapter"}


@pytest.mark.slow
def test_a_record_says_what_its_model_cost(run: Run) -> None:
    _, cocktail = run("LoRACocktail", category_field="genre", domain_min_users=5, merge="uniform")
    result, single = run("TALLRec", save_every_seconds=19)  # in a folder of its own, whose record the next run replaces
    assert cocktail["trained_parameters"] == 2 * single["trained_parameters"] > 0  # two adapters of one shape; the LM is frozen
    _, bpr = run("BPR")
    assert bpr["trained_parameters"] == (61 + 41) * 64  # users and items with padding, RecBole's width
    assert bpr["users_per_second"] > 0 and bpr["seconds"]["waited"] == 0
    _, again = run("TALLRec", checkpoint_dir=str(Path(result["record"]).parents[2]))
    assert again["users_per_second"] is None  # its scores were cached
    assert again["commit"] is None or len(again["commit"].rstrip("+")) == 40


@pytest.mark.parametrize(
    ("values", "heading", "mask_history", "because"),
    [
        ({"eval_args": {"mode": "full"}}, "tiny, mode full, history masked", True, None),
        (
            {"eval_args": {"mode": "full"}, "mask_history": False},
            "tiny, mode full, history masked for general models alone: mask_history: False",
            False,
            "mask_history: False",
        ),
        ({}, "tiny, 60 users, candidates", None, None),
        ({"eval_args": {"mode": "uni5"}}, "tiny, mode uni5", None, None),
    ],
)
def test_a_record_and_its_heading_say_whether_the_history_is_masked(
    run: Run,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    heading: str,
    mask_history: bool | None,
    because: str | None,
) -> None:
    record = strict(run("Pop", seed=9, **values)[0]["record"])
    assert (record["protocol"]["mask_history"], record["protocol"]["unmasked_because"]) == (mask_history, because)
    assert heading in caplog.text and ("history" in heading or f"{heading}, history" not in caplog.text)


def test_recboles_own_modes_are_recorded_as_such(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    record = strict(run("BPR", eval_args={"mode": "uni5"})[0]["record"])
    assert record["candidates_sha256"] == {} and record["ranks"]["BPR"] == {}
    assert record["half_width_95"] == {"BPR": {}} and "mrr" not in record["results"]["BPR"]
    assert "tiny, mode uni5" in caplog.text and "±" not in caplog.text


def test_a_record_holds_the_metrics_of_each_slice(run: Run) -> None:
    record = strict(run("TALLRec")[0]["record"])
    assert list(record["slices"]) == ["TALLRec", "no adapter"]
    users = [{name: part.pop("users") for name, part in parts.items()} for parts in record["slices"].values()]
    assert users[0] == users[1] and users[0].keys() == {"cold", "warm"} and sum(users[0].values()) < 60
    keys = {f"{metric}@{k}" for metric in ("hit", "ndcg", "mrr") for k in (1, 5)}
    for part in (part for parts in record["slices"].values() for part in parts.values()):
        widths = part.pop("half_width_95")
        assert part.keys() == widths.keys() == keys and all(0 <= value <= 1 for value in (*part.values(), *widths.values()))


def test_a_full_ranking_has_an_mrr_over_the_whole_catalogue(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    result, record = run("BPR", eval_args={"mode": "full"})
    ranks = np.array(list(record["ranks"]["BPR"].values()))
    assert ranks.max() > 10 and list(record["results"]["BPR"])[-1] == "mrr"
    assert record["results"]["BPR"] == result["test_result"]
    assert record["results"]["BPR"]["mrr"] == pytest.approx(np.mean(1 / ranks)) and len(ranks) == 60
    assert record["half_width_95"]["BPR"]["mrr"] == pytest.approx(half_width(record["ranks"]["BPR"], lambda rank: 1 / rank))
    assert all(part["mrr"] > part["mrr@5"] for part in record["slices"]["BPR"].values())
    assert re.search(r"ndcg@5 +mrr@5 +mrr +hit@1 cold \(n=", caplog.text)
    assert "mrr" not in run("BPR")[1]["results"]["BPR"]  # of 10 candidates


def test_users_with_several_targets_have_no_intervals_and_no_uncut_mrr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PAIRS", 1)
    args = {"mode": "full", "split": {"RS": [0.5, 0.2, 0.3]}, "order": "RO"}
    _, record = run("BPR", eval_args=args, eval_batch_size=1)  # a batch a user, some of whom have one target
    assert record["ranks"]["BPR"] == {} and record["protocol"]["targets"] == "together"
    assert "mrr" not in record["results"]["BPR"] and record["half_width_95"] == {"BPR": {}}


def test_the_first_metric_has_the_intervals_and_the_slices(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    values = {"metrics": ["Recall", "NDCG", "MRR"], "topk": [10], "valid_metric": "NDCG@10", "eval_args": {"mode": "full"}}
    _, record = run("SASRec", **values)
    assert re.search(r" recall@10 +ndcg@10 +mrr@10 +mrr +recall@10 cold \(n=\d+\) +recall@10 warm \(n=\d+\)", caplog.text)
    value, width = (record[key]["SASRec"]["recall@10"] for key in ("results", "half_width_95"))
    parts = [record["slices"]["SASRec"][name] for name in ("cold", "warm")]
    for name, part in zip(("cold", "warm"), parts, strict=True):  # with the users of a slice, its metrics follow from the ranks
        ranks = [record["ranks"]["SASRec"][user] for user in record["slice_users"][name]]
        assert part["users"] == len(ranks) and part["recall@10"] == pytest.approx(np.mean(np.array(ranks) <= 10))
    shown = [f"{part['recall@10']:.4f} ±{part['half_width_95']['recall@10']:.3f}" for part in parts]
    line = next(line for line in caplog.text.splitlines() if line.startswith("SASRec "))
    assert line.split("  ")[1].strip() == f"{value:.4f} ±{width:.3f}" and re.search(" +".join(map(re.escape, shown)) + "$", line)


@pytest.mark.parametrize(
    "values",
    [{"slices": {}}, {"slices": None}, {"new_items": 0.2}, {"train_dataset": "other"}, {"eval_args": {"mode": "uni5"}}],
)
def test_slices_that_tell_nothing_are_not_shown(values: dict[str, Any], run: Run, caplog: pytest.LogCaptureFixture) -> None:
    result, record = run("BPR", seed=79, **values)
    assert record["slices"] == {"BPR": {}} and "run record:" in caplog.text and "(n=" not in caplog.text
    assert record["results"]["BPR"] == pytest.approx(dict(result["test_result"]))


def test_the_table_names_scenario_and_slices(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("SASRec", seed=80, cold_users=0.3)
    heading = r"tiny, cold0\.3x3, 13 users, candidates [0-9a-f]{12}\n"
    assert re.search(heading + r" +hit@1 .* hit@1 cold \(n=\d+\) +hit@1 warm \(n=\d+\)", caplog.text)


def test_table() -> None:
    rows = [
        Row("A", {"hit@1": 0.25, "mrr@5": 0.5}, Ranks(), {"hit@1": 0.125, "mrr@5": 0.1}),
        Row("B", {"hit@1": 1.0, "mrr@5": 0.0}, Ranks()),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split() == ["hit@1", "mrr@5"]
    assert lines[2].split() == ["A", "0.2500", "±0.125", "0.5000"] and lines[3].split() == ["B", "1.0000", "0.0000"]


def test_table_with_slices() -> None:
    parts = {"warm": {"users": 12, "hit@1": 0.5, "half_width_95": {"hit@1": 0.25}}}
    lines = table([Row("A", {"hit@1": 0.25, "mrr@1": 0.25}, Ranks(), {"hit@1": 0.125}, parts)]).splitlines()
    assert lines[0].split("  ")[-1].strip() == "hit@1 warm (n=12)"
    assert lines[2].split() == ["A", "0.2500", "±0.125", "0.5000", "±0.250"]
    shown = table([Row("A", {"itemcoverage@5": 0.25, "hit@1": 0.5}, Ranks(), {"hit@1": 0.125}, parts)])
    assert "warm" not in shown and "±" not in shown  # ranks do not give the first metric


# -- what a model reports ----------------------------------------------------------------------------------------------


def test_a_model_may_write_beside_its_record(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def report(self: Any, folder: Path) -> list[str]:
        assert (folder / "record.json").is_file()
        (folder / "picture").write_text("drawn")
        return ["one expert", "another one"]

    monkeypatch.setattr(ClassicalRecommender, "report", report)
    path = Path(run_recbole_llm("Pop", "tiny", config_dict=settings)["record"])
    assert path.with_name("picture").read_text() == "drawn" and caplog.messages[-2:] == ["one expert", "another one"]


def test_a_report_that_fails_is_raised_with_the_record_written(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def report(self: Any, folder: Path) -> list[str]:
        raise OSError("no paper")

    monkeypatch.setattr(ClassicalRecommender, "report", report)
    with pytest.raises(OSError, match="no paper"):
        run_recbole_llm("Pop", "tiny", config_dict=settings)
    (path,) = Path(settings["checkpoint_dir"]).glob("runs/*/record.json")
    assert strict(str(path))["model"] == "Pop"


# -- a run from which another one is initialised ------------------------------------------------------------------------


@pytest.fixture
def saved_run(tmp_path: Path) -> Path:
    """The folder of a run with one stage."""

    def build(work: Work) -> None:
        (work.out / "weights").write_text("weights")

    cache = StageCache(tmp_path / "saved" / "stages")
    cache.run(Stage("lm", {}, build))
    folder = tmp_path / "saved" / "runs" / "Laser-ml-100k-1234abcd"
    folder.mkdir(parents=True)
    record = {"model": "Laser", "dataset": "ml-100k", "config": {}, "stages": {"lm": cache.folders["lm"].name}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "record.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_saved_run_is_read_from_its_folder_or_its_record(saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SavedRun.read(saved_run)
    assert run.record["model"] == "Laser" and run.root == saved_run.parents[1]
    assert (run.stage("lm") / "weights").read_text() == "weights" and run.stage("lm").parent == run.root / "stages"
    monkeypatch.chdir(saved_run)
    assert all(
        SavedRun.read(given) == run
        for given in (str(saved_run), saved_run / "record.json", ".", f"../{saved_run.name}/record.json")
    )


def test_a_saved_run_that_was_moved_with_its_stages_is_found(saved_run: Path, tmp_path: Path) -> None:
    saved_run.parents[1].rename(tmp_path / "elsewhere")
    moved = SavedRun.read(tmp_path / "elsewhere" / "runs" / saved_run.name)
    assert moved.stage("lm").is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("given", ["nowhere", "nowhere/record.json", "saved", ""])
def test_a_saved_run_that_is_not_there_is_refused(given: str, saved_run: Path) -> None:
    with pytest.raises(ValueError, match=f"init_from: there is no run at {given} .* does not exist.*give a run's folder"):
        SavedRun.read(given)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"model": "Laser"}'])
def test_what_is_no_record_is_refused(content: bytes, saved_run: Path) -> None:
    (saved_run / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"init_from: {saved_run}/record.json is no record of a run.*; give a run's folder"):
        SavedRun.read(saved_run)


def test_an_edited_record_of_a_saved_run_is_refused(saved_run: Path) -> None:
    file = saved_run / "record.json"
    file.write_text(sealed(json.loads(file.read_text())))
    SavedRun.read(saved_run)
    file.write_text(file.read_text().replace("Laser", "Loser"))
    with pytest.raises(ValueError, match=r"init_from: .*record\.json is damaged or was edited: .*; repeat the run"):
        SavedRun.read(saved_run)


def test_a_record_that_names_no_stages_is_refused(saved_run: Path) -> None:
    rewrite(saved_run, stages=None)
    with pytest.raises(
        ValueError,
        match=r"init_from: .* is damaged: its stages are not names .* \(--model=Laser --dataset=ml-100k",
    ):
        SavedRun.read(saved_run)


def test_a_stage_that_is_not_there_or_damaged_is_refused(saved_run: Path) -> None:
    run = SavedRun.read(saved_run)
    with pytest.raises(ValueError, match=r"init_from: .* has no stage ingredient \(it has: lm\); give the run that trained it"):
        run.stage("ingredient")
    (run.stage("lm") / "weights").write_text("weightS")
    with pytest.raises(ValueError, match="init_from: the stage lm of .*weights: its SHA-256 .*repeat the run"):
        run.stage("lm")
    shutil.rmtree(run.root / "stages")
    with pytest.raises(ValueError, match="init_from: the stage lm of .* is missing or damaged .*repeat the run"):
        run.stage("lm")


def test_another_run_can_be_initialised_from_ours(run: Run) -> None:
    result, record = run("TALLRec")
    saved = SavedRun.read(Path(result["record"]).parent)
    assert saved.record == record and (saved.stage("ingredient") / "adapter_config.json").is_file()


def test_a_record_names_the_code_that_computed_it(run: Run, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Of the model, ours or RecBole's, of the data and of the trainer; what draws pictures is none of it."""
    recorded = {name: run(name)[1]["code"] for name in ("TALLRec", "BPR")}
    configs = {name: LLMConfig(name, "tiny", config_dict=settings) for name in recorded}
    assert {name: record_code(config) for name, config in configs.items()} == recorded
    assert len({*recorded.values()}) == 2 and {len(value) for value in recorded.values()} == {64}
    tree = code._tree
    for module, differ in {
        "recbole_llm.llm.scoring": ["TALLRec"],
        "recbole_llm.classical.trainer": ["TALLRec", "BPR"],
        "recbole_llm.classical.popularity": ["TALLRec", "BPR"],
        "recbole_llm.data.splitting": ["TALLRec", "BPR"],
        "recbole.model.general_recommender.bpr": ["BPR"],
        "recbole_llm.evaluation.plots": [],
    }.items():
        monkeypatch.setattr(code, "_tree", lambda name, module=module: (tree(name)[0] + "!" * (name == module), tree(name)[1]))
        assert [name for name in recorded if record_code(configs[name]) != recorded[name]] == differ, module


def test_a_models_own_parts_are_code_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    (tmp_path / "own_retriever.py").write_text(
        "from recbole.model.general_recommender.bpr import BPR\n\n\nclass Own(BPR):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config, tree = LLMConfig("TALLRec", "tiny", config_dict={**settings, "retriever": "own_retriever:Own"}), code._tree
    before = record_code(config)
    monkeypatch.setattr(code, "_tree", lambda name: (tree(name)[0] + "!" * (name == "own_retriever"), tree(name)[1]))
    assert record_code(config) != before
