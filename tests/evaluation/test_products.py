"""Vectors are found where scores are products, and candidates are scored by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.evaluation.products import Products
from tests.evaluation.product_model import ALL, BIAS, FEW, ITEMS, USERS, product


def in_parts(interaction: Interaction) -> Tensor:
    return torch.cat([product(interaction[start : start + 4]) for start in range(0, len(interaction), 4)])


@pytest.mark.parametrize(
    "score",
    [
        product,
        lambda batch: torch.matmul(USERS[batch["user"]], ITEMS.transpose(0, 1)).flatten(),
        lambda batch: USERS[batch["user"]].mm(ITEMS.t()),
        lambda batch: torch.nn.functional.linear(USERS[batch["user"]], ITEMS, BIAS),
        lambda batch: product(batch) + BIAS,
    ],
)
def test_vectors_of_a_model_that_scores_by_products(score: Callable[[Any], Tensor]) -> None:
    found = Products.of(score, FEW, 500)
    assert found is not None
    torch.testing.assert_close(found.users(ALL) @ found.items[1:].T, score(ALL).view(30, 500)[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "score",
    [
        lambda batch: product(batch).sigmoid(),
        lambda batch: product(batch) + USERS[batch["user"]].flip(1) @ ITEMS.T,
        lambda batch: product(batch) + USERS[batch["user"], :1],  # the same items, but other scores
        lambda batch: torch.cdist(USERS[batch["user"]], ITEMS),
        lambda batch: product(batch) * torch.nan,
        in_parts,  # fewer users at once than those of the check
        lambda batch: product(batch)[:, :-1],
    ],
)
def test_other_scores_are_no_products(score: Callable[[Any], Tensor]) -> None:
    assert Products.of(score, FEW, 500) is None


def test_one_user_does_not_tell_a_bias_from_another_term() -> None:
    assert Products.of(product, FEW[:1], 500) is None


def test_users_of_one_vector_do_not_either() -> None:
    same = Interaction({"user": torch.zeros(5, dtype=torch.long)})
    assert Products.of(lambda batch: product(batch).sigmoid(), same, 500) is None


def test_a_retriever_that_scores_some_users_at_once() -> None:
    found = Products.of(in_parts, FEW[:3], 500)
    assert found is not None
    assert torch.equal(found.users(ALL), USERS)


def test_a_model_that_changes_is_an_error() -> None:
    current = product
    found = Products.of(lambda batch: current(batch), FEW, 500)
    current = lambda batch: BIAS.expand(len(batch), -1)  # noqa: E731
    assert found is not None
    with pytest.raises(RuntimeError, match="no product of the vectors of 5 users"):
        found.users(FEW)
    assert found.scores(FEW, torch.zeros(5, 1, dtype=torch.long)) is None
