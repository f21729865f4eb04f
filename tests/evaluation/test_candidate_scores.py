"""Candidates are scored alone where a model multiplies vectors, and from its scores of the catalogue where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.evaluation import ranks
from recbole_llm.evaluation.candidate_scores import CandidateScores

GENERATOR = torch.Generator().manual_seed(0)
USERS, ITEMS, BIAS = (torch.randn(*shape, generator=GENERATOR) for shape in ((30, 8), (500, 8), (500,)))
ITEMS[250:] = ITEMS[:250]
ALL = Interaction({"user": torch.arange(30)})
LISTED = torch.randint(1, 500, (30, 6), generator=GENERATOR)


class Model:
    """Scores by a function of users' vectors and the item matrix; ``whole`` are the users of each call that went to the end."""

    n_items = 500

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]):
        self.score, self.items, self.users, self.whole = score, ITEMS.clone(), USERS, []  # type: ignore[var-annotated]

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        scores = self.score(self.users[interaction["user"]], self.items).flatten()
        self.whole.append(len(interaction))
        return scores


def product(users: Tensor, items: Tensor) -> Tensor:
    return users @ items.T


def autoencoder(users: Tensor, items: Tensor) -> Tensor:
    rows = torch.zeros(len(users), len(items))
    return (users + rows.sum(1, keepdim=True)) @ items.T


@pytest.mark.parametrize(
    ("score", "whole"),
    [
        (product, [13]),
        (lambda users, items: product(users, items) + BIAS, [13]),
        (lambda users, items: product(users, items).sigmoid(), [13, 30]),
        (autoencoder, [13, 30]),  # as many numbers as scores
    ],
)
def test_the_scores_are_those_of_a_full_ranking(score: Any, whole: list[int]) -> None:
    model = Model(score)
    scores = CandidateScores(model, "item")
    found = [scores(ALL, LISTED) for _ in range(2)]
    assert model.whole == whole + whole[1:]
    expected = score(USERS, ITEMS).gather(1, LISTED)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(*found)


def test_as_many_users_at_once_as_there_may_be_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts = Model(product), []

    def counted(users: Tensor, items: Tensor) -> Tensor:
        parts.append(len(users))
        return product(users, items)

    model.score = counted
    monkeypatch.setattr(ranks, "SCORES", 7 * 6 * 8)  # seven users, six candidates, vectors of eight numbers
    expected = product(USERS, ITEMS).gather(1, LISTED)
    torch.testing.assert_close(CandidateScores(model, "item")(ALL, LISTED), expected)
    assert parts == [2, 2, 7, 7, 7, 7, 2] and model.whole == [2]


def test_equal_vectors_have_equal_scores_and_nobody_has_others_by_a_batch() -> None:
    scores = CandidateScores(Model(product), "item")
    listed = LISTED % 250
    whole = scores(ALL, torch.cat([listed, listed + 250], 1))
    assert torch.equal(whole[:, :6], whole[:, 6:])
    assert torch.equal(torch.cat([scores(ALL[[user]], listed[[user]]) for user in range(30)]), whole[:, :6])


def test_the_vectors_are_those_of_now() -> None:
    model = Model(product)
    scores = CandidateScores(model, "item")
    before = scores(ALL, LISTED)
    model.items = -ITEMS
    assert torch.equal(scores(ALL, LISTED), -before) and model.whole == [13]


def test_one_user_does_not_tell_whether_the_scores_are_products() -> None:
    model = Model(product)
    scores = CandidateScores(model, "item")
    for users in (slice(1), slice(2), slice(1)):
        torch.testing.assert_close(scores(ALL[users], LISTED[users]), product(USERS, ITEMS).gather(1, LISTED)[users])
    assert model.whole == [1, 2]


def test_a_batch_that_a_model_scores_in_another_way_has_its_own_scores() -> None:
    model = Model(product)
    scores = CandidateScores(model, "item")
    scores(ALL, LISTED)
    model.score = torch.cdist
    assert torch.equal(scores(ALL, LISTED), torch.cdist(USERS, ITEMS).gather(1, LISTED))
    model.score = lambda users, items: torch.cat([part @ items.T for part in users.split(13)])  # not of all users at once
    torch.testing.assert_close(scores(ALL, LISTED), product(USERS, ITEMS).gather(1, LISTED))


def test_the_whole_catalogue_is_scored_at_once() -> None:
    model = Model(product)
    catalogue = torch.arange(500).expand(30, -1)
    assert torch.equal(CandidateScores(model, "item")(ALL, catalogue), product(USERS, ITEMS)) and model.whole == [30]
