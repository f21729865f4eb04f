"""The run record: strict JSON with all that a table or a test needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.evaluation.evaluator import Ranks
from recbole_llm.evaluation.record import Row, hit_interval, table

Run = Callable[..., Any]


def strict(path: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def test_a_record_holds_what_section_3_of_the_design_asks_for(run: Run) -> None:
    result, _ = run("BPR")
    record = strict(result["record"])
    assert record["results"]["BPR"] == pytest.approx(dict(result["test_result"]))
    assert record["best_valid_result"] == pytest.approx(dict(result["best_valid_result"]))
    assert (record["model"], record["dataset"], record["seed"]) == ("BPR", "tiny", 2020)
    assert set(record["ranks"]["BPR"]) == {f"u{user}" for user in range(60)}  # tokens, not internal ids
    assert all(1 <= rank <= 10 for rank in record["ranks"]["BPR"].values())
    assert record["config"]["candidates"] == {"source": "uniform", "number": 9, "seed": 2020, "file": None}
    assert {len(record["candidates_sha256"][phase]) for phase in ("valid", "test")} == {64}
    assert {"recbole_llm", "python", "recbole", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["seconds"]["train"] > 0 and record["seconds"]["evaluate"] > 0
    assert record["peak_memory_bytes"] > 1e6 and record["written"].endswith("Z")
    assert record["backbone"] is None and len(record["fingerprint"]) == 64
    assert Path(result["record"]).parent.name == f"BPR-tiny-{record['fingerprint'][:8]}"


def test_a_record_of_an_llm_model_names_its_backbone_and_controls(run: Run) -> None:
    result, _ = run("TALLRec")
    record = strict(result["record"])
    assert "tiny-llama" in record["backbone"] and record["backbone_fingerprint"]
    assert list(record["results"]) == ["TALLRec", "no adapter"] == list(record["ranks"])
    assert record["stage_seconds"].keys() == {"ingredient"}
    assert result["controls"].keys() == {"no adapter"}


def test_recboles_own_modes_are_recorded_as_such(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    record = strict(run("BPR", eval_args={"mode": "uni5"})[0]["record"])
    assert record["candidates_sha256"] == {} and record["ranks"]["BPR"] == {}
    assert record["hit@1_half_width_95"]["BPR"] is None
    assert "tiny, mode uni5" in caplog.text


def test_a_record_holds_the_metrics_of_each_slice(run: Run) -> None:
    record = strict(run("TALLRec")[0]["record"])
    assert list(record["slices"]) == ["TALLRec", "no adapter"]
    users = [{name: part.pop("users") for name, part in parts.items()} for parts in record["slices"].values()]
    assert users[0] == users[1] and users[0].keys() == {"cold", "warm"} and sum(users[0].values()) < 60
    keys = {f"{metric}@{k}" for metric in ("hit", "ndcg", "mrr") for k in (1, 5)} | {"hit@1_half_width_95"}
    for part in (part for parts in record["slices"].values() for part in parts.values()):
        assert part.keys() == keys and all(0 <= value <= 1 for value in part.values())


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


def test_half_width_is_that_of_a_proportion() -> None:
    assert hit_interval(Ranks(ranks=[1, 1, 2, 3])) == pytest.approx(1.96 * np.sqrt(0.5 * 0.5 / 4))
    assert hit_interval(Ranks()) is None


def test_table() -> None:
    rows = [
        Row("A", {"hit@1": 0.25, "mrr@5": 0.5}, Ranks(), 0.125),
        Row("B", {"hit@1": 1.0, "mrr@5": 0.0}, Ranks(), None),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split() == ["hit@1", "mrr@5"]
    assert lines[2].split() == ["A", "0.2500", "±0.125", "0.5000"] and lines[3].split() == ["B", "1.0000", "0.0000"]


def test_table_with_slices() -> None:
    parts = {"warm": {"users": 12, "hit@1": 0.5, "hit@1_half_width_95": 0.25}}
    lines = table([Row("A", {"hit@1": 0.25, "mrr@1": 0.25}, Ranks(), 0.125, parts)]).splitlines()
    assert lines[0].split("  ")[-1].strip() == "hit@1 warm (n=12)"
    assert lines[2].split() == ["A", "0.2500", "±0.125", "0.5000", "±0.250"]
    assert "warm" not in table([Row("A", {"mrr@5": 0.25}, Ranks(), 0.125, parts)])
