"""RecBole's causal Transformer layers with less work on padding, later items and random numbers, and the same results.

RecBole's attention computes the scores of all pairs of positions and masks those of later items. Here causal attention leaves
them out: with torch's fused kernel or, on a CPU with dropout, which that kernel lacks, in blocks of positions. Padding on the
right needs no mask, since every item stands before it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from recbole.model.layers import FeedForward, MultiHeadAttention
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

BLOCK = 64
"""Positions whose attention is computed at a time on a CPU."""


def make_fast(model: nn.Module, *, causal: bool = True) -> nn.Module:
    """Replace the computation of a model's Transformer layers; returns ``model``. Attention that is not causal stays.

    States of items are those of RecBole within rounding; those of padding are others, and of a history without items.
    Dropout draws other random numbers.
    """
    for module in model.modules():
        if causal and isinstance(module, MultiHeadAttention):
            vars(module)["forward"] = MethodType(_attend, module)
        elif isinstance(module, FeedForward) and getattr(module.intermediate_act_fn, "__func__", None) is FeedForward.gelu:
            vars(module)["intermediate_act_fn"] = gelu
        elif type(module) is nn.Dropout:
            vars(module)["forward"] = MethodType(_drop, module)
    return model


def has_attention(model: nn.Module) -> bool:
    """Whether the model has RecBole's attention, whose cost grows with the square of the length."""
    return any(isinstance(module, MultiHeadAttention) for module in model.modules())


def _drop(self: Any, values: Tensor) -> Tensor:
    return fast_dropout(values, self.p if self.training else 0.0)


def _attend(self: Any, input_tensor: Tensor, attention_mask: Tensor) -> Tensor:
    """RecBole's ``MultiHeadAttention.forward`` with a causal mask: states [B, L, H] of states [B, L, H]."""
    heads = (self.query, self.key, self.value)
    query, key, value = (self.transpose_for_scores(part(input_tensor)).transpose(1, 2) for part in heads)  # [B, heads, L, d]
    share = self.attn_dropout.p if self.training else 0.0
    if share and input_tensor.device.type == "cpu":
        context = causal_attention(query, key, value, lambda shares: fast_dropout(shares, share))
    else:
        context = scaled_dot_product_attention(query, key, value, dropout_p=share, is_causal=True)
    states = self.dense(context.transpose(1, 2).flatten(2))
    return self.LayerNorm(self.out_dropout(states) + input_tensor)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Causal attention [B, heads, L, d], block by block; ``drop`` is applied to the shares, as in RecBole."""
    length, scale = query.shape[2], query.shape[3] ** -0.5
    later = query.new_full((BLOCK, BLOCK), -torch.inf).triu(1)
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(2, 3) * scale  # [B, heads, block, end]
        scores[..., start:] += later[: end - start, : end - start]
        blocks.append(drop(scores.softmax(-1)) @ value[:, :, :end])
    return torch.cat(blocks, 2)


def fast_dropout(values: Tensor, share: float) -> Tensor:
    """Dropout; on a CPU from 16 random bits a value, a quarter of the time of torch's. The share is rounded to 1 / 65,536."""
    if not share or values.device.type != "cpu":
        return dropout(values, share, training=share > 0)
    bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: values.numel()].view(values.shape) >= round(share * 2**16) - 2**15
    return values * kept.to(values.dtype).mul_(1 / (1 - share))
