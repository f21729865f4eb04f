"""Exact sums of LoRA adapters: ``dW = sum_i w_i s_i B_i A_i``, with ``s_i = alpha_i / r_i`` (rsLoRA: ``/ sqrt(r_i)``).

Stacking the factors, ``A = [w_1 s_1 A_1; ...]`` and ``B = [B_1, ...]``, gives this sum exactly, as one adapter of rank
``sum r_i``. Adding the A's and the B's separately (RecCocktail's equation 7 as written, peft's
``combination_type="linear"``) introduces cross terms ``B_i A_j``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE, Adapter, check_same_base, factor_key

MERGE_FILE = "merge.json"


def write_adapter(adapter: Adapter, folder: Path, card: Mapping[str, Any]) -> None:
    """Write a PEFT folder with ``merge.json`` (the card) and a README that lists the source adapters.

    Args:
        card: JSON-serializable; the README shows its ``sources`` (``{"name", "sha256"}`` each), ``weights`` and ``method``.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True))
    (folder / MERGE_FILE).write_text(json.dumps(dict(card), indent=1))
    (folder / "README.md").write_text(_readme(adapter, card), encoding="utf-8")


def weighted_sum(adapters: Sequence[Adapter], weights: Tensor | Mapping[str, Tensor], name: str = "merged") -> Adapter:
    """The adapter whose ``dW`` is exactly the weighted sum of the adapters' ``dW``.

    Args:
        adapters: K adapters of one base model; ranks, alphas and target modules may differ (a missing module adds 0).
        weights: ``[K]``, or module -> ``[K]`` for every module of any adapter. Negative weights and zero are allowed.

    Returns:
        An fp32 adapter that unmodified peft loads, with ``r = lora_alpha =`` the sum of the ranks of nonzero weight.

    Raises:
        ValueError: different base models, a wrong number of weights or modules without weights.
    """
    check_one_base(adapters)
    factors = {}
    for module in all_modules(adapters):
        row = _weights_of(module, weights, len(adapters))
        parts = [(w, *adapter.factors(module)) for w, adapter in taking_part(module, adapters, row)]
        a = torch.cat([w * a for w, a, _ in parts])  # [sum r, D_in]
        b = torch.cat([b for *_, b in parts], dim=1)  # [D_out, sum r]
        factors[module] = a, b
    return assemble(adapters, factors, name)


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best approximation of rank ``rank`` in each module, and the share of ``sum ||dW||^2`` that it retains.

    The SVD of ``B A`` uses the QR decompositions of the thin factors: it decomposes ``[R, R]``, never ``[D_out, D_in]``.

    Raises:
        ValueError: ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"compress: rank must be at least 1, got {rank}")
    factors = {}
    retained = total = 0.0
    for module in adapter.modules:
        a, b = (factor.double() for factor in adapter.factors(module))
        q_a, r_a = torch.linalg.qr(a.T)  # [D_in, R], [R, R]
        q_b, r_b = torch.linalg.qr(b)  # [D_out, R], [R, R]
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)  # [R, R], [R], [R, R]
        top = min(rank, len(s))
        root = s[:top].sqrt()  # in both factors, so that their norms are equal
        a = (root[:, None] * (vh[:top] @ q_a.T)).float()  # [top, D_in]
        b = ((q_b @ u[:, :top]) * root).float()  # [D_out, top]
        factors[module] = a, b
        retained += s[:top].square().sum().item()
        total += s.square().sum().item()
    return assemble([adapter], factors, adapter.name), retained / total if total else 1.0


def all_modules(adapters: Sequence[Adapter]) -> list[str]:
    """The union of the adapters' modules, in order of first appearance."""
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))


def taking_part(module: str, adapters: Sequence[Adapter], row: Sequence[float]) -> list[tuple[float, Adapter]]:
    """Weight and adapter of each adapter that changes the module and whose weight is not 0.

    If all weights are 0, the result is the first adapter with weight 0, since the merged module needs at least one factor.
    """
    have = [(w, adapter) for w, adapter in zip(row, adapters, strict=True) if adapter.has(module)]
    return [(w, adapter) for w, adapter in have if w != 0] or [(0.0, have[0][1])]


def assemble(sources: Sequence[Adapter], factors: Mapping[str, tuple[Tensor, Tensor]], name: str) -> Adapter:
    """An adapter from the given factors, with the config of the first source, ``s = 1`` and exactly these modules.

    Args:
        factors: module -> ``A`` ``[r, D_in]`` and ``B`` ``[D_out, r]``; ranks may differ by module.
    """
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    rank = max(ranks.values())
    pattern = {module: r for module, r in ranks.items() if r != rank}
    config = sources[0].config | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if any(set(source.modules) != set(factors) for source in sources):
        # a list of name suffixes may not describe the union of modules; full names always do
        config |= {"target_modules": sorted(factors), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    tensors = {factor_key(module, factor): t for module, ab in factors.items() for factor, t in zip("AB", ab, strict=True)}
    return Adapter(config, tensors, name)


def check_one_base(adapters: Sequence[Adapter]) -> None:
    """Check that adapters have the same base model, weight layout and widths.

    Raises:
        ValueError: no adapters, or two that differ; the error has both names and both values.
    """
    if not adapters:
        raise ValueError("merge: no adapter given")
    first = adapters[0]
    for other in adapters[1:]:
        check_same_base(first, other)
        pairs: dict[str, tuple[Any, Any]] = {
            "weight layouts": (bool(first.config.get("fan_in_fan_out")), bool(other.config.get("fan_in_fan_out"))),
        }
        # the base model may not be recorded; the widths are always known
        both = [module for module in first.modules if other.has(module)]
        pairs |= {f"widths of {module}": (first.widths(module), other.widths(module)) for module in both}
        for what, (one, two) in pairs.items():
            if one != two:
                raise ValueError(f"adapters {first.name!r} and {other.name!r} have different {what}: {one!r} and {two!r}")


def _weights_of(module: str, weights: Tensor | Mapping[str, Tensor], count: int) -> list[float]:
    if isinstance(weights, Mapping):
        if module not in weights:
            raise ValueError(f"weighted_sum: no weights for the module {module!r}")
        weights = weights[module]
    if weights.shape != (count,):
        raise ValueError(f"weighted_sum: {count} adapters need weights of shape [{count}], got {list(weights.shape)}")
    return weights.tolist()


def _readme(adapter: Adapter, card: Mapping[str, Any]) -> str:
    base = adapter.config.get("base_model_name_or_path")
    base_line = f"\nbase_model: {json.dumps(base)}" if base else ""
    sources = "\n".join(f"| {source['name']} | `{source['sha256']}` |" for source in card.get("sources", []))
    weights = json.dumps(card.get("weights", {}))
    return f"""---
library_name: peft{base_line}
tags: [lora, merge]
---
# {adapter.name}

A LoRA adapter of rank {adapter.config["r"]}, merged by RecBole-LLM (method `{card.get("method", "given")}`) from:

| source | SHA-256 of its weights |
|---|---|
{sources}

Coefficients: {weights if len(weights) < 500 else "one per module"}; `{MERGE_FILE}` has all coefficients and measured points.
"""
