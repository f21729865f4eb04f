"""Rows of candidates: RecBole's collector reads the same from them as from rows of the whole catalogue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config
from recbole.evaluator import Collector, Evaluator

from recbole_llm.evaluation.ranks import Ranks, candidate_rows

ITEMS = 30
METRICS = ["Hit", "MRR", "NDCG", "Recall", "Precision", "MAP"]


def catalogue_row(scores: torch.Tensor, listed: torch.Tensor, targets: torch.Tensor, partial: bool) -> tuple[torch.Tensor, ...]:
    """The oracle: scores of the catalogue [B, I], minus infinity outside the candidates; the targets; the missed."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    places = torch.empty_like(order).scatter_(1, order, torch.arange(scores.size(1)).expand_as(order))
    ranks = (-places).float()
    ranks = ranks.masked_fill(scores == -math.inf, -math.inf) if partial else ranks
    rows = torch.full((len(scores), ITEMS), -math.inf).scatter_(1, listed, ranks)
    missed = rows.gather(1, targets[:, None])[:, 0] == -math.inf
    for row in missed.nonzero().flatten().tolist():
        rows[row] = rows[row].clamp(min=torch.finfo(rows.dtype).min)
        rows[row, 0] = rows[row, targets[row]] = -math.inf
    return rows, targets, missed


def measured(rows: torch.Tensor, columns: torch.Tensor, topk: list[int], metrics: list[str]) -> dict[str, float]:
    Config.compatibility_settings(None)  # names of numpy that RecBole's metrics read
    config: Any = {"metrics": metrics, "topk": topk, "eval_args": {"mode": {"valid": "full", "test": "full"}}}
    config |= {"device": "cpu", "metric_decimal_place": 12}
    collector = Collector(config)
    collector.eval_batch_collect(rows.clone(), None, torch.arange(len(rows)), columns)
    return Evaluator(config).evaluate(collector.get_data_struct())


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("topk", [[1, 3], [2, 12], [5, 28]])
@pytest.mark.parametrize("width", [2, 7])
def test_recboles_metrics_are_those_of_rows_of_the_catalogue(partial: bool, topk: list[int], width: int) -> None:
    """With ties, missed targets, candidates without a score, and lists longer than there are candidates."""
    generator = torch.Generator().manual_seed(width)
    values = torch.tensor([-1.0, 0.0, 0.5, *[-math.inf] * partial])
    scores = values[torch.randint(len(values), (300, width), generator=generator)]
    items = torch.stack([torch.randperm(ITEMS - 1, generator=generator)[: width + 1] + 1 for _ in scores])
    listed = items[:, :width]
    targets = items.gather(1, torch.randint(width + 1, (300, 1), generator=generator))[:, 0]
    expected, own, lacking = catalogue_row(scores, listed, targets, partial)
    rows, columns, missed = candidate_rows(scores, listed, targets, max(topk), partial=partial)
    assert torch.equal(missed, lacking) and 0 < missed.sum() < 300
    assert measured(rows, columns, topk, METRICS) == measured(expected, own, topk, METRICS)
    for metric in [*METRICS, "GAUC"]:
        if metric != "GAUC" or (width > 2 and not partial):  # a missed target has no AUC in the rows of the catalogue
            one = measured(rows[~missed], columns[~missed], topk, [metric])
            assert one == measured(expected[~missed], own[~missed], topk, [metric])


def test_a_missed_target_is_below_every_candidate() -> None:
    """And so its AUC is 0."""
    scores, listed = torch.tensor([[0.0, 1, 2], [0, 1, 2]]), torch.tensor([[4, 5, 6], [4, 5, 6]])
    rows, columns, missed = candidate_rows(scores, listed, torch.tensor([9, 8]), 5)
    assert missed.all() and rows.shape == (2, 7)
    assert measured(rows, columns, [5], ["GAUC", "Hit"]) == {"gauc": 0, "hit@5": 0}


@given(st.data())
def test_a_row_orders_the_candidates_as_the_ranks_do(data: st.DataObject) -> None:
    scores = torch.tensor(
        data.draw(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=4, max_size=4), min_size=1, max_size=3))
    )
    listed = torch.stack([torch.randperm(9)[:4] + 1 for _ in scores])
    for slot in range(4):
        row, columns, missed = candidate_rows(scores, listed, listed[:, slot], 3)
        assert torch.isfinite(row).sum(1).tolist() == [4] * len(scores) and not missed.any()
        ranks = Ranks()
        ranks.add(torch.arange(len(scores)), scores, torch.full((len(scores),), slot))
        target = row.gather(1, columns[:, None])
        assert ((row > target).sum(1) + 1).tolist() == ranks.ranks
        assert ((row == target).sum(1) == 1).all()  # torch.topk has nothing to choose


def test_many_equal_scores_keep_the_order_of_the_file() -> None:
    """So many that a sort which is not stable shuffles them."""
    listed = torch.arange(1, 501)[None]
    row, _, _ = candidate_rows((torch.arange(500) % 2).float()[None], listed, listed[:, 0], 10)
    assert row.argsort(descending=True)[0, :500].tolist() == [*range(1, 500, 2), *range(0, 500, 2)]


def test_not_a_number_is_refused() -> None:
    listed = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="NaN"):
        candidate_rows(torch.tensor([[0.0, math.nan]]), listed, listed[:, 0], 1)
    row, _, _ = candidate_rows(torch.tensor([[0.0, -math.inf]]), listed, listed[:, 0], 1)
    assert row.tolist()[0][:2] == [0, -1]
