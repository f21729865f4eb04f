"""Inner products of the updates of adapters, from their thin factors: no matrix of the model's size is built."""

from __future__ import annotations

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
