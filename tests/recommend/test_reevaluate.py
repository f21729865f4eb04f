"""A finished run evaluated again: by its own weights, on what a run with the same settings would be evaluated on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import cli
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend.reevaluate import evaluate_run

FULL = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
RERANKED = {"retriever_top": 5, "retriever_config": {"epochs": 1}}
QUICK = {"epochs": 2, "lora_epochs": 1, "train_samples": 16, "valid_users": 8}


def trained(name: str, settings: dict[str, Any], **changes: Any) -> Path:
    return Path(run_recbole_llm(name, "tiny", config_dict={**settings, **QUICK, **changes})["record"])


@pytest.fixture(scope="module")
def sasrec(module_settings: dict[str, Any]) -> Path:
    return trained("SASRec", module_settings)


def files(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.parent.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", ["BPR", "SASRec", pytest.param("TALLRec", marks=pytest.mark.slow)])
def test_another_ranking_is_that_of_a_run_with_these_settings(name: str, module_settings: dict[str, Any]) -> None:
    """Validation is the same in both, so the weights are."""
    run = trained(name, module_settings)
    before = files(run)
    own = RERANKED if name == "TALLRec" else {}
    found = evaluate_run(run.parent, {**own, "eval_args": {"mode": "full"}})
    again, other = read_record(found), read_record(trained(name, module_settings, **FULL, **own))
    assert again["ranks"] == other["ranks"] and again["results"] == other["results"]
    assert again["protocol"] == other["protocol"] and again["candidates_sha256"] == other["candidates_sha256"]
    assert again.get("checkpoint") == read_record(run).get("checkpoint") and again["evaluates"] == run.parent.name
    assert found.parent not in (run.parent, Path(other["config"]["checkpoint_dir"]) / "runs") and files(run) == before


def test_other_metrics_and_users_are_those_of_the_same_ranks(sasrec: Path) -> None:
    """Also without the metric by which the run was validated."""
    before = read_record(sasrec)
    found = read_record(evaluate_run(sasrec, {"metrics": ["Recall"], "topk": [2, 7], "eval_users": 9}))
    ranks = before["ranks"]["SASRec"]
    assert {*found["results"]["SASRec"]} == {"recall@2", "recall@7"}
    assert len(found["ranks"]["SASRec"]) == 9
    assert all(ranks[user] == rank for user, rank in found["ranks"]["SASRec"].items())
    assert found["seconds"]["train"] == before["seconds"]["train"] and found["code"] == before["code"]


@pytest.mark.parametrize("metrics", [["Novelty", "ItemCoverage", "Hit"], ["GAUC"]])
def test_metrics_may_begin_with_one_that_cannot_choose_weights(metrics: list[str], sasrec: Path) -> None:
    """Of lists, or without a cutoff."""
    found = read_record(evaluate_run(sasrec, {"metrics": metrics, "topk": [3], "eval_args": {"mode": "full"}}))["results"][
        "SASRec"
    ]
    assert {name.partition("@")[0] for name in found} - {"mrr"} == {*map(str.lower, metrics)} - {"mrr"}


def test_lists_may_lack_the_quotes_that_a_shell_removes(sasrec: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        given: dict[str, Any] = {}
        patch.setattr("recbole_llm.recommend.reevaluate.evaluate_run", lambda run, keys, *_: given.update(keys))
        cli.main(["evaluate", f"--run={sasrec.parent}", "--metrics=[Recall,MAP]", "--topk=[2,7]", "--eval_args={mode:full}"])
    assert given == {"metrics": ["Recall", "MAP"], "topk": [2, 7], "eval_args": {"mode": "full"}}


def test_of_the_candidates_only_the_given_key_changes(module_settings: dict[str, Any]) -> None:
    run = trained("BPR", module_settings, candidates={"source": "popularity", "num_negatives": 9, "seed": 7})
    found = read_record(evaluate_run(run, {"candidates": {"num_negatives": 5}}))["config"]["candidates"]
    assert (found["source"], found["num_negatives"], found["seed"]) == ("popularity", 5, 7)


def test_another_retriever_is_trained_and_is_not_that_of_the_run(module_settings: dict[str, Any]) -> None:
    drawn = {"source": "retriever", "num_negatives": 5}
    run = trained("BPR", module_settings, candidates=drawn, retriever="BPR", retriever_config={"epochs": 1})
    other = {"retriever_config": {"epochs": 3}}
    found = read_record(evaluate_run(run, other))
    expected = read_record(trained("BPR", module_settings, candidates=drawn, retriever="BPR", **other))
    assert found["candidates_sha256"] == expected["candidates_sha256"] != read_record(run)["candidates_sha256"]


def test_without_a_change_it_is_the_same_result_in_another_folder(sasrec: Path) -> None:
    found = evaluate_run(sasrec, {})
    assert found != sasrec and read_record(found)["results"] == read_record(sasrec)["results"]
    assert read_record(evaluate_run(found, {}))["results"] == read_record(sasrec)["results"]  # of a run that was evaluated again


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--epochs=3", "epochs is not a setting of the evaluation, .* give it to a new run .--model=SASRec --dataset=tiny"),
        ("--valid_metric=NDCG@10", "valid_metric is not a setting of the evaluation"),
        (
            "--eval_args={'split': {'LS': 'test_only'}}",
            "eval_args: .* would change the split or the validation",
        ),
        ("--eval_args={'mode': {'valid': 'full', 'test': 'full'}}", "eval_args: .* would change the split or the validation"),
        ("--topk=[0]", "topk"),
        ("--metrics=[1]", "metrics: .* is not a list of strings"),
        ("--metrics=None", "metrics: None in the command line is not a list of strings"),
        ("--topk=3.5", "topk: 3.5 in the command line is not a list of whole numbers"),
        ("--topk=None", "topk: None in the command line is not a list of whole numbers"),
        ("--metrics=[ItemCoverage]", r"metrics: ItemCoverage describe .*; give --metrics=\"\['NDCG', 'ItemCoverage'\]\""),
        ("--slices={'cold': 3}", r"slices\.cold: 3 in the command line is not a number"),
        ("--topkk=[5]", "unknown key `topkk` in evaluate; did you mean `topk`"),
    ],
)
def test_what_would_need_a_training_is_refused(
    argument: str, message: str, sasrec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {*sasrec.parents[1].iterdir()}
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", f"--run={sasrec.parent}", argument])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert {*sasrec.parents[1].iterdir()} == before


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"retriever": "BPR"}, "candidates of source: retriever"),
        ({"retriever_config": {"epochs": 1}}, "candidates of source: retriever"),
        ({"retriever_top": 5}, "LLM rankers in a full ranking"),
        ({"mask_history": False}, "full rankings"),
        ({"predictions_topk": 5}, "save_predictions in a full ranking"),
        ({"predictions_topk": 5, "save_predictions": True}, "save_predictions in a full ranking"),
        ({"published_max_new_tokens": 5}, "scoring: published"),
        ({"scorer": "naive"}, "LLM rankers"),
        ({"eval_args": {"mode": "full"}, "candidates": {"num_negatives": 3}}, "rankings of candidates"),
        ({"eval_args": {"mode": "full"}, "candidates": {"seed": 3}}, "rankings of candidates"),
    ],
)
def test_a_key_that_changes_nothing_is_refused(keys: dict[str, Any], what: str, sasrec: Path) -> None:
    before = {*sasrec.parents[1].iterdir()}
    with pytest.raises(ValueError, match=rf"changes nothing in this evaluation of SASRec; it is for .*{what}"):
        evaluate_run(sasrec, keys)
    assert {*sasrec.parents[1].iterdir()} == before


def test_a_run_warns_of_such_a_key(module_settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    trained("Pop", module_settings, retriever="BPR", predictions_topk=5)
    assert "settings that change nothing here: retriever (for candidates of source: retriever" in caplog.text
    assert "predictions_topk (for save_predictions" in caplog.text
    caplog.clear()
    trained("Pop", module_settings, mask_history=False, **FULL)
    assert "change nothing here" not in caplog.text


def test_keys_that_act_are_accepted(sasrec: Path) -> None:
    full = {"eval_args": {"mode": "full"}, "mask_history": False, "save_predictions": True, "predictions_topk": 3}
    masked = read_record(evaluate_run(sasrec, {**full, "candidates": {"seed": 3}, "eval_users": 9}))["protocol"]["mask_history"]
    assert masked is False


def test_the_command_prints_the_table(sasrec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["evaluate", f"--run={sasrec.parent}", "--topk=[3]", "--save_predictions=True"])
    printed = capsys.readouterr().err
    assert "hit@3" in printed and "run record: " in printed
    record = Path(printed.split("run record: ")[-1].split("\n")[0])
    assert (record.parent / "predictions.parquet").is_file()


def test_a_second_call_leaves_the_predictions_of_the_first(sasrec: Path) -> None:
    first = evaluate_run(sasrec, {"topk": [4], "save_predictions": True})
    second = evaluate_run(sasrec, {"topk": [4]})
    assert second == first and first.with_name("predictions.parquet").is_file()
    assert read_record(second)["predictions"] == "predictions.parquet"
