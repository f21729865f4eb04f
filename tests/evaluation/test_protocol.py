"""The same users and the same candidates for every model, whatever the model and whatever it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recbole_llm.data import loading

MODELS = ["Pop", "BPR", "SASRec", "NeuMF", "TALLRec"]
Run = Callable[..., Any]


def test_every_model_ranks_the_same_candidates_of_the_same_users(run: Run) -> None:
    """NeuMF has no ``full_sort_predict`` and scores item by item."""
    records = [run(model)[1] for model in MODELS]
    assert len({record["candidates_sha256"]["test"] for record in records}) == 1
    assert len({record["candidates_sha256"]["valid"] for record in records}) == 1
    assert len({tuple(sorted(record["ranks"][record["model"]])) for record in records}) == 1
    assert records[0]["candidates_sha256"]["valid"] != records[0]["candidates_sha256"]["test"]


def test_a_subset_of_users_is_the_same_for_every_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, so that some hold no user of the subset."""
    monkeypatch.setattr(loading, "PAIRS", 1)
    subsets = []
    for model in MODELS:
        record = run(model, eval_users=7, eval_batch_size=82)[1]
        subsets.append(tuple(sorted(record["ranks"][model])))
    assert len(set(subsets)) == 1 and len(subsets[0]) == 7
    whole = run("BPR")[1]["ranks"]["BPR"]
    subset = run("BPR", eval_users=7, eval_batch_size=82)[1]["ranks"]["BPR"]
    assert {user: whole[user] for user in subset} == subset


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_a_full_ranking_has_the_subset_of_users_of_the_candidates(model: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them at the rank that they have among all users."""
    monkeypatch.setattr(loading, "PAIRS", 1)
    full = {"eval_args": {"mode": "full"}, "epochs": 0}
    drawn = run(model, eval_users=7)[1]["ranks"][model]
    every, few = run(model, **full)[1], run(model, eval_users=7, eval_batch_size=3, **full)[1]
    assert few["ranks"][model].keys() == drawn.keys() and len(drawn) == 7
    assert few["ranks"][model] == {user: every["ranks"][model][user] for user in drawn}
    ranks = np.array([*few["ranks"][model].values()])
    assert few["results"][model]["hit@5"] == pytest.approx((ranks <= 5).mean())
    assert few["results"][model]["mrr"] == pytest.approx((1 / ranks).mean())
    assert few["passport"]["sha256"] == every["passport"]["sha256"]


def test_a_subset_of_users_is_refused_where_recbole_evaluates_all(run: Run) -> None:
    with pytest.raises(ValueError, match=r"eval_users: 7 samples the users of candidates and of full rankings, and .* 'uni9'"):
        run("BPR", eval_users=7, eval_args={"mode": "uni9"})


@pytest.mark.slow
@pytest.mark.parametrize("model", ["TALLRec", "Laser"])
def test_llm_models_rank_the_catalogue_for_the_subset_alone(model: str, run: Run) -> None:
    changes = {"eval_args": {"mode": {"valid": "candidates" if model == "TALLRec" else "full", "test": "full"}}}
    small = {"m_former_hidden_size": 16, "m_former_num_layers": 2, "m_former_num_heads": 2, "num_experts": 2, "prefix_length": 2}
    small |= {"train_samples": 16, "phase1_epochs": 1, "phase2_epochs": 1, "cf_config": {"epochs": 1}}
    changes |= {"history_label": "", **small} if model == "Laser" else {"retriever_config": {"epochs": 1}}
    record = run(model, eval_users=7, **changes)[1]
    assert record["ranks"][model].keys() == run("BPR", eval_users=7)[1]["ranks"]["BPR"].keys()
