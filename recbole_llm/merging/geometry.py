"""Sizes and angles of the updates of adapters, from their thin factors: no matrix of the model's size is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from recbole_llm.llm.adapter_folders import Adapter


def inner(first: Adapter, second: Adapter, module: str) -> float:
    """``<dW_1, dW_2>`` (Frobenius) of one module in fp64; 0 if one of the adapters lacks it.

    With ``dW = B A``, it is the sum of the entries of ``(B_1^T B_2) * (A_1 A_2^T)``, both ``[r_1, r_2]``.
    """
    if not (first.has(module) and second.has(module)):
        return 0.0
    (a, b), (other_a, other_b) = ([factor.double() for factor in adapter.factors(module)] for adapter in (first, second))
    return float(((b.T @ other_b) * (a @ other_a.T)).sum())


def norm(adapter: Adapter, module: str) -> float:
    """``||dW||`` (Frobenius) of one module."""
    return max(inner(adapter, adapter, module), 0.0) ** 0.5


def pairs(adapters: Sequence[Adapter], trace: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """What is known of each pair of adapters before they are merged; None where it is not defined or was not measured.

    Returns:
        For each pair: ``adapters`` (their names), ``cosine`` of the whole updates, ``cosine_mean`` over the modules that both
        change, ``norm_ratio`` ``||dW_1|| / ||dW_2||``, and ``entropy_gap``, the mean entropy of the first minus that of the
        second (nats), from the points of a merge's ``trace`` where one adapter has all weight.
    """
    entropies = [_entropy_of(place, len(adapters), trace) for place in range(len(adapters))]
    norms = [{module: norm(adapter, module) for module in adapter.modules} for adapter in adapters]
    found = []
    for one, two in combinations(range(len(adapters)), 2):
        both = [module for module, size in norms[one].items() if size and norms[two].get(module)]
        products = {module: inner(adapters[one], adapters[two], module) for module in both}
        sizes = [math.sqrt(math.fsum(size**2 for size in norms[place].values())) for place in (one, two)]
        each = [product / (norms[one][module] * norms[two][module]) for module, product in products.items()]
        first, second = entropies[one], entropies[two]
        found.append(
            {
                "adapters": [adapters[one].name, adapters[two].name],
                "cosine": math.fsum(products.values()) / (sizes[0] * sizes[1]) if all(sizes) else None,
                "cosine_mean": math.fsum(each) / len(each) if each else None,
                "norm_ratio": sizes[0] / sizes[1] if all(sizes) else None,
                "entropy_gap": None if first is None or second is None else first - second,
            }
        )
    return found


def _entropy_of(place: int, count: int, trace: Sequence[Mapping[str, Any]]) -> float | None:
    """The measured entropy of one adapter alone."""
    alone = [float(other == place) for other in range(count)]
    for point in trace:
        weights = point["weights"] if isinstance(point["weights"][0], list) else [point["weights"]]  # [1 or M, K]
        if "entropy" in point and all(row == alone for row in weights):
            return float(point["entropy"])
    return None
