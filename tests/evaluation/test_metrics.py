"""Metrics from ranks are RecBole's, with intervals over users; what ranks do not give cannot stop a training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.evaluator.metrics import MRR, NDCG, Hit, Recall

from recbole_llm.evaluation.metrics import FROM_RANKS, check_valid_metric, half_widths, metrics


@pytest.fixture(scope="module", autouse=True)
def _numpy_as_recbole_has_it() -> Iterator[None]:
    """RecBole's metrics read ``np.float``, which its Config puts there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        yield


@given(ranks=st.lists(st.integers(1, 21), min_size=1, max_size=12))
def test_metrics_are_recboles(ranks: list[int]) -> None:
    config = {"topk": [1, 5, 10], "metric_decimal_place": 12}
    lists = np.array([[place == rank for place in range(1, 11)] for rank in ranks])  # [N, k], where the target stands
    sizes = np.ones(len(ranks), dtype=int)
    expected = {}
    for metric in (Hit, Recall, NDCG, MRR):
        name = metric.__name__.lower()
        made: Any = metric(config)
        values = made.metric_info(lists, sizes) if metric in (NDCG, Recall) else made.metric_info(lists)
        expected.update(made.topk_result(name, values))
    assert metrics(ranks, expected) == pytest.approx(expected, abs=1e-9)


def test_a_metric_without_a_k_is_not_cut_and_what_ranks_do_not_give_is_left_out() -> None:
    assert metrics([1, 4, 50], ["mrr@10", "itemcoverage@10", "mrr", "auc"]) == pytest.approx(
        {"mrr@10": 1.25 / 3, "mrr": 1.27 / 3}
    )
    assert metrics([], ["hit@1", "mrr"]) == half_widths([], ["hit@1", "mrr"]) == {}


def test_half_widths_are_those_of_a_mean() -> None:
    found = half_widths([1, 1, 2, 3], ["hit@1", "recall@2", "mrr", "giniindex@5"])
    assert found == pytest.approx(
        {
            "hit@1": 1.96 * np.sqrt(0.5 * 0.5 / 4),
            "recall@2": 1.96 * np.sqrt(0.75 * 0.25 / 4),
            "mrr": 1.96 * np.std([1, 1, 1 / 2, 1 / 3]) / 2,
        }
    )


def test_a_metric_that_all_users_share_has_an_interval() -> None:
    """The rule of three: with a share of 3 / N, no other value is seen with probability .05 (and less if N is small)."""
    for users, missed in ((48, 0.05), (2, 1.0)):
        width = half_widths([9] * users, ["hit@1"])["hit@1"]
        assert width == min(1.0, 3 / users) and (1 - width) ** users <= missed
    assert half_widths([1] * 60, ["ndcg@10"]) == {"ndcg@10": 0.05}


@pytest.mark.parametrize("name", ["Hit@10", "hit@1", "Recall@5", "NDCG@10", "ndcg", "MRR", "mrr@20"])
def test_a_valid_metric_that_follows_from_ranks(name: str) -> None:
    check_valid_metric(name)
    assert metrics([1, 2, 3], [name.lower()])[name.lower()] > 0


@pytest.mark.parametrize("name", ["MAP@10", "AUC", "Precision@5", "ItemCoverage@10", "hits@10", "", "@10"])
def test_a_valid_metric_that_does_not_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^valid_metric: {name} does not follow .*; choose Hit, Recall, NDCG or MRR$"):
        check_valid_metric(name)


def test_every_metric_from_ranks_is_computed() -> None:
    names = [f"{name}@5" for name in FROM_RANKS]
    assert list(metrics([1], names)) == names and set(metrics([1], names).values()) == {1.0}
