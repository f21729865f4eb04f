"""Sizes and angles of updates against the dense deltas, and the features of pairs of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_llm.merging.geometry import inner, norm, pairs
from recbole_llm.merging.random_lora import zero_like
from tests.merging.test_arithmetic import UNEQUAL, dense


def test_inner_products_are_those_of_the_dense_deltas() -> None:
    for one in UNEQUAL:
        for two in UNEQUAL:
            first, second = dense(one), dense(two)
            for module in first:
                expected = float((first[module] * second[module]).sum()) if module in second else 0.0
                assert inner(one, two, module) == pytest.approx(expected, rel=1e-5, abs=1e-9)
            assert norm(one, one.modules[0]) == pytest.approx(float(first[one.modules[0]].norm()), rel=1e-6)


def test_the_features_of_pairs_are_those_of_the_dense_deltas() -> None:
    found = pairs(UNEQUAL)
    assert [pair["adapters"] for pair in found] == [["a", "b"], ["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"], ["c", "d"]]
    deltas = {adapter.name: dense(adapter) for adapter in UNEQUAL}
    modules = list(deltas["a"])
    for pair in found:
        one, two = (deltas[name] for name in pair["adapters"])
        whole = [torch.cat([(delta[m] if m in delta else 0 * deltas["a"][m]).flatten() for m in modules]) for delta in (one, two)]
        assert pair["cosine"] == pytest.approx(float(torch.cosine_similarity(*whole, dim=0)), abs=1e-6)
        both = [m for m in modules if m in one and m in two]
        each = [float(torch.cosine_similarity(one[m].flatten(), two[m].flatten(), dim=0)) for m in both]
        assert pair["cosine_mean"] == pytest.approx(sum(each) / len(each), abs=1e-6)
        assert pair["norm_ratio"] == pytest.approx(float(whole[0].norm() / whole[1].norm()), rel=1e-5)
        assert pair["entropy_gap"] is None


@pytest.mark.parametrize("rows", [1, 3])
def test_the_entropy_gap_is_that_of_the_single_adapters(rows: int) -> None:
    def point(weights: list[float], entropy: float) -> dict[str, Any]:
        return {"phase": "any", "weights": weights if rows == 1 else [weights] * rows, "entropy": entropy}

    trace = [point([0.5, 0.5], 9.0), point([1.0, 0.0], 1.25), {"phase": "x", "weights": [0.0, 1.0]}, point([0.0, 1.0], 2.0)]
    assert pairs(UNEQUAL[:2], trace)[0]["entropy_gap"] == -0.75
    assert pairs(UNEQUAL[:2], trace[:3])[0]["entropy_gap"] is None


def test_an_adapter_of_its_own_has_the_angle_0_and_one_without_update_none() -> None:
    (same,) = pairs([UNEQUAL[0], UNEQUAL[0]])
    assert same["cosine"] == pytest.approx(1) == same["cosine_mean"] == same["norm_ratio"]
    (none,) = pairs([UNEQUAL[0], zero_like(UNEQUAL[0])])
    assert none["cosine"] is none["cosine_mean"] is none["norm_ratio"] is None
