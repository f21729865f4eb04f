"""The steps of a full ranking: the mask, ties, re-ranking."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.evaluation import full_ranking
from recbole_llm.evaluation.full_ranking import RandomTies, mask, rerank
from recbole_llm.evaluation.ranks import target_ranks

INF = math.inf
USERS, ITEMS = [f"u{user}" for user in range(400)], [f"i{item}" for item in range(21)]
TIES = RandomTies(USERS, ITEMS)


def test_the_mask_holds_the_padding_item_and_the_history_and_nothing_else() -> None:
    scores = torch.tensor([[9.0, 1, -INF, 3], [9, 4, 5, 6]])
    before = scores.clone()
    masked = mask(scores, (torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3])))
    assert torch.equal(scores, before)
    assert torch.isneginf(masked).tolist() == [[True, True, False, False], [True, False, True, True]]
    assert masked[0, 3] == 3 and masked[0, 2] < -1e38  # what a model excludes by itself is last and may still be the target
    assert torch.isneginf(mask(scores, None)).sum(1).tolist() == [1, 1]
    with pytest.raises(ValueError, match="NaN as the score of some items"):
        mask(scores.masked_fill(scores == 9, math.nan), None)


def test_scores_without_ties_stay_as_they_are() -> None:
    scores = mask(torch.rand(7, 21, generator=torch.Generator().manual_seed(0)), None)
    assert TIES(scores, torch.arange(7), 5, torch.arange(1, 8)) is scores


def test_a_constant_scorer_is_at_chance() -> None:
    """Hit@5 of 20 items over 400 users: 1/4, with a standard deviation of 0.022; and each target would be found by some user."""
    users = torch.arange(400)
    for target in (1, 20):
        scores, targets = mask(torch.ones(400, 21), None), torch.full((400,), target)
        untied = TIES(scores, users, 5, targets)
        ranks, ties = target_ranks(untied, targets)
        assert (target_ranks(scores, targets)[1] == 19).all() and not ties.any()
        pair = torch.full((400, 21), -INF).index_fill(
            1, torch.tensor([target, 7]), 0.0
        )  # of two, half of the users have it first
        assert abs((target_ranks(TIES(pair, users, 5, targets), targets)[0] == 1).float().mean() - 0.5) < 0.1
        assert abs((ranks <= 5).float().mean() - 0.25) < 0.08 and {*ranks.tolist()} == {*range(1, 21)}


@settings(deadline=None)
@given(st.data())
def test_the_top_and_the_rank_agree_and_better_scores_stay_better(data: st.DataObject) -> None:
    """Whatever is tied, and wherever ``topk`` would put it."""
    rows = st.lists(st.sampled_from([-INF, -1.0, 0.0, 0.5]), min_size=21, max_size=21)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=3)))
    scores[:, 0], scores[:, 7] = -INF, 0.0  # the target is not masked
    targets, users = torch.full((len(scores),), 7), torch.arange(len(scores))
    untied = TIES(scores, users, 5, targets)
    assert torch.equal(torch.isneginf(untied), torch.isneginf(scores))
    for row, old in zip(untied, scores, strict=True):
        assert not ((row[:, None] > row) & (old[:, None] < old)).any()
        finite = row[row > -INF].tolist()
        assert len({*finite}) == len(finite) or len({*old[old > -INF].tolist()}) == len(finite)
    ranks = target_ranks(untied, targets)[0]
    for k in (1, 3, 5):
        listed = (untied.topk(k, dim=1).indices == 7).any(1)
        assert torch.equal(listed, ranks <= k)


def test_the_order_of_ties_depends_on_ids_and_not_on_their_numbers() -> None:
    """Another numbering of the items and users gives every item the same place."""
    items = torch.cat([torch.tensor([0]), 1 + torch.randperm(20, generator=torch.Generator().manual_seed(1))])
    other = RandomTies(USERS[::-1], [ITEMS[item] for item in items.tolist()])
    scores = mask(torch.ones(400, 21), None)
    ours = TIES(scores, torch.arange(400), 5)
    theirs = other(scores, torch.arange(399, -1, -1), 5)
    ours, theirs = (values.argsort(dim=1, descending=True)[:, :20] for values in (ours, theirs))
    order = items[theirs]
    assert (order == ours).float().mean() > 0.999


def test_rows_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, users = mask(torch.ones(400, 21), None), torch.arange(400)
    whole = TIES(scores, users, 5)
    monkeypatch.setattr(full_ranking, "_CELLS", 50)
    assert torch.equal(TIES(scores, users, 5), whole)


def test_a_masked_item_is_not_ranked_anew() -> None:
    """Of five items to re-rank two are masked: no score of theirs is read, and none of theirs is raised."""
    scores, users = torch.tensor([[-INF, 3.0, -INF, 2.0, 1.0]]), torch.tensor([0])

    def score(_: Any, items: torch.Tensor) -> torch.Tensor:
        assert {*items.flatten().tolist()} == {1, 3, 4}
        return items.float()

    assert rerank(scores, None, users, score, 5, TIES)[1].tolist() == [[-INF, 1, -INF, 2, 3]]
    assert rerank(scores, None, users, lambda _, items: items.float(), 2, TIES)[1].tolist() == [[-INF, 2, -INF, 3, 1]]
    last = rerank(scores, None, users, lambda _, items: items.float().masked_fill(items < 4, -INF), 5, TIES)[1]
    assert last[0, 4] == 3 and {*last[0, [1, 3]].tolist()} == {1, 2}  # an item that the model excludes is above a masked one


def test_a_score_that_is_no_number_is_refused_among_re_ranked_items_too() -> None:
    scores = torch.tensor([[-INF, 3.0, 2.0, 1.0]])
    with pytest.raises(ValueError, match="NaN as the score of some of the re-ranked items"):
        rerank(scores, None, torch.tensor([0]), lambda _, items: items.float().masked_fill(items == 2, math.nan), 2, TIES)


def test_re_ranked_items_are_shown_in_an_order_that_does_not_tell_the_retrievers() -> None:
    """Of 400 users, each of ten items is at each of ten places about 40 times, whatever the retriever's order."""
    shown = []

    def score(_: Any, items: torch.Tensor) -> torch.Tensor:
        shown.append(items)
        return items.float()

    scores, users = mask(torch.arange(21.0).repeat(400, 1), None), torch.arange(400)
    rerank(scores, None, users, score, 10, TIES)
    rerank(mask(-torch.arange(21.0).repeat(400, 1), None), None, users, score, 20, TIES)
    best = shown[0]
    counts = torch.stack([(best == item).sum(0) for item in range(11, 21)])  # [items, places]
    assert counts.sum() == 4000 and counts.min() > 15 and counts.max() < 65
    assert torch.equal(best, torch.stack([row[row > 10] for row in shown[1]]))  # the order of the others does not matter either


def test_a_re_ranker_that_cannot_tell_items_apart_is_at_chance_and_its_ties_are_counted() -> None:
    """The retriever has the target first for all 400 users: a constant score leaves it at each of ten places."""
    scores, users = mask(torch.arange(21.0).repeat(400, 1), None), torch.arange(400)
    targets = torch.full((400,), 20)
    tied, untied = rerank(scores, None, users, lambda _, items: torch.zeros(items.shape), 10, TIES)
    ranks = target_ranks(untied, targets)[0]
    assert {*ranks.tolist()} == {*range(1, 11)} and abs((ranks == 1).float().mean() - 0.1) < 0.05
    assert (target_ranks(tied, targets)[1] == 9).all() and not target_ranks(untied, targets)[1].any()
    assert torch.equal(untied[:, :11], scores[:, :11])
    pairs, apart = rerank(scores, None, users, lambda _, items: (items // 2).float(), 10, TIES)
    assert (pairs[:, 20] == 20).all() and (pairs[:, 19] == pairs[:, 18]).all()  # 18 and 19 are equal, 20 has no other
    assert ((apart >= pairs - 1) & (apart <= pairs)).all()


def test_infinite_scores_become_the_largest_and_smallest_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([[0.0, INF, -INF, 1.0]])
    assert mask(scores, None).tolist() == [[-INF, largest, -largest, 1.0]]
    assert mask(scores, None, partial=True).tolist() == [[-INF, INF, -INF, 1.0]]
