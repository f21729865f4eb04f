"""Counts the tokens of every forward pass of a causal LM, for the comparison of a run with its plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_llm.store.costs import Tokens, count


def tokens_of(rows: int, length: int, past: int, mask: Tensor | None, logits: int = 0, cached: int = 0) -> Tokens:
    """The tokens of a forward pass.

    Args:
        rows, length: B and T of the input; ``past`` more tokens of each row are in the cache.
        mask: attention mask [B, past + T], or None or another shape, in which no padding is known.
        logits: positions at which logits are computed.
        cached: tokens whose keys and values are in memory after the pass, by all rows.
    """
    fed = rows * length
    real = int(mask[:, -length:].sum()) if mask is not None and mask.dim() == 2 else fed
    return Tokens(1, real, fed, fed * (past + length), logits, fed, cached, logits)


def count_passes(model: Any) -> None:
    """Add the tokens of every later forward pass of a causal LM of ``transformers`` to the current meters.

    The hooks are on the LM without its head, which sees every token, and on the head. A loss may call the head by itself, without
    gradients at that moment, so its logits count to the LM's last pass.
    """
    last = {"trained": False}

    def enter(_: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        given = [*arguments, inputs.get("input_ids"), inputs.get("inputs_embeds")]
        rows, length = next(value for value in given if value is not None).shape[:2]
        cache = inputs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        cached = rows * (past + length) if inputs.get("use_cache") else 0
        tokens = tokens_of(rows, length, past, inputs.get("attention_mask"), cached=cached)
        last["trained"] = torch.is_grad_enabled()
        count(tokens, **last)

    def head(_: Any, __: Any, logits: Tensor) -> None:
        positions = logits.shape[:-1].numel()  # a caller may reduce the states that the head reads
        count(Tokens(logits=positions, most_logits=positions), **last)

    model.base_model.register_forward_pre_hook(enter, with_kwargs=True)
    if (output := model.get_output_embeddings()) is not None:
        output.register_forward_hook(head)
