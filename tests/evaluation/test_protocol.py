"""The same users and the same candidates for every model, whatever the model and whatever it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ["Pop", "BPR", "SASRec", "NeuMF", "TALLRec"]
Run = Callable[..., Any]


def test_every_model_ranks_the_same_candidates_of_the_same_users(run: Run) -> None:
    """NeuMF has no ``full_sort_predict`` and scores item by item."""
    records = [run(model)[1] for model in MODELS]
    assert len({record["candidates_sha256"]["test"] for record in records}) == 1
    assert len({record["candidates_sha256"]["valid"] for record in records}) == 1
    assert len({tuple(sorted(record["ranks"][record["model"]])) for record in records}) == 1
    assert records[0]["candidates_sha256"]["valid"] != records[0]["candidates_sha256"]["test"]


def test_a_subset_of_users_is_the_same_for_every_model(run: Run) -> None:
    """Small batches, so that some hold no user of the subset."""
    subsets = []
    for model in MODELS:
        record = run(model, eval_users=7, eval_batch_size=82)[1]
        subsets.append(tuple(sorted(record["ranks"][model])))
    assert len(set(subsets)) == 1 and len(subsets[0]) == 7
    whole = run("BPR")[1]["ranks"]["BPR"]
    subset = run("BPR", eval_users=7, eval_batch_size=82)[1]["ranks"]["BPR"]
    assert {user: whole[user] for user in subset} == subset


def test_the_subset_is_that_of_a_full_ranking_too(run: Run, data_path: Path) -> None:
    full = {"eval_args": {"mode": "full"}}
    drawn = run("BPR", eval_users=7, eval_batch_size=82)[1]["ranks"]["BPR"]
    for model in ("BPR", "SASRec", "Imported"):
        given = full | ({"predictions": str(data_path / "predictions.csv")} if model == "Imported" else {})
        whole, subset = (run(model, **given, **few)[1] for few in ({}, {"eval_users": 7}))
        assert whole["ranks"][model].keys() > subset["ranks"][model].keys() == drawn.keys()
        assert {user: whole["ranks"][model][user] for user in drawn} == subset["ranks"][model] or model != "Imported"
        assert "mrr" in subset["results"][model] and subset["half_width_95"][model]["hit@1"] is not None
        assert subset["passport"] == whole["passport"]
