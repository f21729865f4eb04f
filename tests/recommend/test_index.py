"""faiss finds the items with the largest products."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recbole_llm.evaluation.products import Products
from recbole_llm.recommend.index import ItemIndex
from recbole_llm.recommend.ranking import Ranking
from tests.evaluation.product_model import ALL, BIAS, FEW, ITEMS, USERS, product


@pytest.mark.parametrize("kind", ["exact", "IVF16,Flat", "HNSW8", "Flat"])
def test_the_index_finds_the_largest_products_without_the_padding_item(kind: str) -> None:
    products = Products.of(lambda batch: product(batch) + BIAS, FEW, 500)
    assert products is not None
    index = ItemIndex(products, kind, ALL)
    items, scores = index.search(ALL, 10)
    best = (product(ALL) + BIAS)[:, 1:].topk(10)
    recall = (items[:, :, None] == best.indices[:, None] + 1).any(1).float().mean().item()
    assert index.recall == pytest.approx(recall) and recall >= 0.95 and items.min() > 0
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    if index.is_exact:
        assert torch.equal(items, best.indices + 1) and str(index) == "index exact"
    else:
        assert f"recall@10 {recall:.3f}" in str(index)


def test_an_index_without_effort_shows_the_recall_that_it_has(caplog: pytest.LogCaptureFixture) -> None:
    products = Products.of(product, FEW, 500)
    assert products is not None
    index = ItemIndex(products, "PQ4x4", ALL)
    assert 0 < index.recall < 0.95 and str(index).startswith("index PQ4x4: recall@10 0.")
    assert f"--index=PQ4x4: it finds {index.recall:.1%} of the 10 best items, less than 95%" in caplog.text


def test_what_an_index_does_not_find_is_no_item() -> None:
    products = Products.of(product, FEW, 500)
    assert products is not None
    index = ItemIndex(products, "IVF100,Flat", ALL)
    index._index.nprobe = 1
    items, scores = index.search(ALL, 499)
    assert (scores[items == 0] == -torch.inf).all() and (items == 0).any() and scores[items > 0].isfinite().all()


@pytest.mark.parametrize("seen", [[], [[1, 2, 3], [4]] * 15])
def test_ties_have_the_order_of_a_full_ranking(seen: list[list[int]]) -> None:
    """Vectors of duplicates are equal: rounding, or faiss's order, must not decide between them."""
    items = torch.cat([torch.zeros(1, 8), ITEMS[1:101].repeat(4, 1)])
    tokens = [str(user) for user in range(31)], [f"i{item}" for item in range(401)]
    run: Any = SimpleNamespace(dataset=SimpleNamespace(tokens=tokens))
    score = lambda batch: USERS[batch["user"]] @ items.T  # noqa: E731
    variant: Any = SimpleNamespace(score_catalogue=score, partial=False, reranked=0)
    products = Products.of(score, FEW, 401)
    assert products is not None
    users = [*range(1, 31)]
    ranked = [
        Ranking(run).of_catalogue(ALL, users, seen, variant, 10, index)[0] for index in (ItemIndex(products, "exact", ALL), None)
    ]
    assert torch.equal(*ranked)
    assert not any({*row} & {*own} for row, own in zip(ranked[0].tolist(), seen, strict=False))
