"""Metrics of the lists themselves: by hand, the same for general and sequential models, and refused for drawn candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.evaluator.collector import DataStruct

from recbole_llm.config import LLMConfig
from recbole_llm.data.histories import Histories
from recbole_llm.evaluation.beyond_accuracy import ITEM_USERS, TITLES, Diversity, Novelty, title_vectors

LISTS = ["ItemCoverage", "GiniIndex", "AveragePopularity", "ShannonEntropy", "TailPercentage", "Novelty", "Diversity"]
CONFIG = {"topk": [1, 2, 3], "metric_decimal_place": 9}
FULL = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", *LISTS]}


def struct(**values: Any) -> DataStruct:
    found = DataStruct()
    for key, value in values.items():
        found.set(key.replace("_", ".", 1), value)
    return found


def test_novelty_is_the_mean_self_information() -> None:
    data = struct(rec_items=torch.tensor([[1, 2, 3], [2, 1, 1]]), data_num_users=9)
    data.set(ITEM_USERS, {1: 8, 2: 2})
    bits = [[0.0, 2.0, 3.0], [2.0, 0.0, 0.0]]  # of 8 users, 8, 2 and nobody chose items 1, 2 and 3
    expected = {f"novelty@{k}": np.mean([np.mean(row[:k]) for row in bits]) for k in (1, 2, 3)}
    assert Novelty(CONFIG).calculate_metric(data) == pytest.approx(expected)


def test_diversity_is_one_minus_the_mean_cosine_of_pairs() -> None:
    vectors = title_vectors(["", "Red River", "red river", "Blue Wolf", "--"])
    assert vectors.shape[0] == 5 and np.asarray(vectors.multiply(vectors).sum(1)).ravel() == pytest.approx([0, 1, 1, 1, 0])
    data = struct(rec_items=torch.tensor([[1, 2, 3], [3, 4, 1]]))
    data.set(TITLES, vectors)
    dense = vectors.toarray()

    def by_hand(items: list[int]) -> float:
        pairs = [(a, b) for place, a in enumerate(items) for b in items[:place]]
        return 1 - sum(dense[a] @ dense[b] for a, b in pairs) / len(pairs)

    expected = {f"diversity@{k}": (by_hand([1, 2, 3][:k]) + by_hand([3, 4, 1][:k])) / 2 for k in (2, 3)}
    found = Diversity(CONFIG).calculate_metric(data)
    assert found == pytest.approx(expected) and found["diversity@2"] == pytest.approx(0.5)


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_they_run_beside_the_others_and_change_nothing(model: str, run: Callable[..., Any]) -> None:
    """RecBole's own collector crashes on its five: RUCAIBox/RecBole#2131."""
    result, _ = run(model, **FULL, seed=3)  # other tests read the log of the usual seed
    found = result["test_result"]
    for key in ("itemcoverage@5", "giniindex@5", "tailpercentage@5", "diversity@5"):
        assert 0 <= found[key] <= 1
    assert found["averagepopularity@5"] > 1 and 0 < found["novelty@5"] < math.log2(60) and "diversity@1" not in found
    assert found["ndcg@5"] == run(model, eval_args={"mode": "full"}, seed=3)[0]["test_result"]["ndcg@5"]


def test_popularity_is_counted_alike_for_general_and_sequential_models(
    settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]
) -> None:
    """RecBole leaves out the first item of each user in a sequential model's counts."""
    counted = []
    for model in ("BPR", "SASRec"):
        made = assemble(model, settings, **FULL)
        counted.append(made.trainer.eval_collector.data_struct.get("data.count_items"))
    counts = made.train._dataset.histories.train_counts
    assert counted[0] == counted[1] == {item: count for item, count in enumerate(counts.tolist()) if count}
    assert sum(made.train._dataset.item_counter.values()) == sum(counted[0].values()) - 60


@pytest.mark.parametrize("metric", LISTS)
@pytest.mark.parametrize("mode", ["candidates", "uni5", {"valid": "full", "test": "candidates"}])
def test_they_are_refused_for_drawn_candidates(metric: str, mode: Any, settings: dict[str, Any]) -> None:
    message = rf"metrics: {metric} describe recommendations from the whole catalogue, and .*test rank drawn .*'mode': 'full'"
    with pytest.raises(ValueError, match=message):
        LLMConfig("BPR", "tiny", config_dict={**settings, "metrics": ["NDCG", metric], "eval_args": {"mode": mode}})


def test_drawn_candidates_of_the_validation_leave_them_out(run: Callable[..., Any], settings: dict[str, Any]) -> None:
    """An LLM ranker is validated on candidates before a full ranking."""
    mode = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    result, _ = run("BPR", **{**FULL, **mode})
    assert "itemcoverage@5" in result["test_result"] and {*result["best_valid_result"]} == {"ndcg@1", "ndcg@5"}
    with pytest.raises(ValueError, match=r"metrics: .*, and valid rank drawn candidates\. Remove them"):
        LLMConfig("BPR", "tiny", config_dict={**settings, **FULL, **mode, "valid_metric": "Novelty@5"})


def test_diversity_without_titles_is_refused_before_training(
    settings: dict[str, Any], data_path: Path, tmp_path: Path, assemble: Callable[..., SimpleNamespace]
) -> None:
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "tiny.inter").write_text((data_path / "tiny" / "tiny.inter").read_text())
    with pytest.raises(ValueError, match=r"metrics: Diversity compares titles, but .*tiny\.item.*; remove it from metrics"):
        assemble("BPR", {**settings, "data_path": str(tmp_path / "data")}, **FULL)


@pytest.mark.parametrize("mode", ["candidates", "full"])
def test_a_list_that_is_longer_than_the_catalogue_is_refused_before_training(
    mode: str, settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]
) -> None:
    with pytest.raises(ValueError, match="topk: 41 is more than the 40 items of tiny; lower it"):
        assemble("BPR", settings, topk=[5, 41], eval_args={"mode": mode})
    assemble("BPR", settings, topk=[5, 40], eval_args={"mode": mode})


def test_who_chose_an_item_again_counts_once() -> None:
    items = [np.array([]), np.array([1, 1, 2, 3, 4]), np.array([2, 1, 1, 3, 4])]
    histories = Histories(["", "a", "b"], ["", *"wxyz"], [row.astype(int) for row in items], repeats_kept=True)
    assert histories.train_counts.tolist() == [0, 4, 2, 0, 0] and histories.train_users.tolist() == [0, 2, 2, 0, 0]
