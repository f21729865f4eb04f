"""Inputs of a causal LM's forward pass, for training, scoring and encoding, and the training loss.

Legend: B rows, T tokens, S soft tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.answer_loss import answer_loss
from recbole_llm.llm.packing import pad_left

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def lm_loss(model: Any, examples: Sequence[Example], *, soft: Tensor | None = None) -> Tensor:
    """Mean next-token loss, in nats, over the answers of examples.

    Padding is on the right, where no causal model sees it, so that there is no mask. ``lm_head`` reads the states before answer
    tokens only, so many at a time that their logits fit into memory.

    Args:
        examples: of any lengths; soft slots index rows of ``soft`` [S, D]. These and a row's first token are never targets.

    Raises:
        ValueError: no example has an answer, or one is longer than the model's context.
    """
    check_context(model.config, max(len(example.row) for example in examples))
    embed = model.get_input_embeddings()
    rows = [torch.tensor(example.row.ids, device=embed.weight.device) for example in examples]
    tokens = pad_sequence(rows, batch_first=True)  # [B, T]
    mask = pad_sequence([torch.tensor(example.mask, device=tokens.device) for example in examples], batch_first=True)  # [B, T]
    targets = mask[:, 1:].bool()  # [B, T - 1]
    if not targets.any():
        raise ValueError("no row has an answer token after its first, so there is no loss; check the answer mask")
    inputs = fed(embedded(embed, tokens, [example.row for example in examples], soft, left=False)[:, :-1])  # [B, T - 1]
    return answer_loss(model, {**inputs, "use_cache": False}, targets, tokens[:, 1:][targets])


def loss_scale(model: Any) -> float:
    """The factor of a loss whose gradients pass through ``model``: float16 would round those of a large batch to zero."""
    return 1024.0 if model.get_input_embeddings().weight.dtype == torch.float16 else 1.0


def left_padded(
    model: Any, rows: Sequence[Prompt], pad_token_id: int, soft: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Rows as keyword arguments of a forward pass, as tokens [B, T], and where these are real, [B, T] bool.

    Padding is masked, and positions count real tokens only. All rows end in the last column.

    Raises:
        ValueError: a row is longer than the model's context.
    """
    check_context(model.config, max(map(len, rows)))
    embed = model.get_input_embeddings()
    tokens, real = pad_left([torch.tensor(row.ids, device=embed.weight.device) for row in rows], pad_token_id)
    inputs = {
        **fed(embedded(embed, tokens, rows, soft)),
        "attention_mask": real.long(),
        "position_ids": positions(real),
        "use_cache": False,
    }
    return inputs, tokens, real


def embedded(embed: Any, tokens: Tensor, rows: Sequence[Prompt], soft: Tensor | None = None, *, left: bool = True) -> Tensor:
    """Input embeddings [B, T, D] of rows that are padded to tokens [B, T]; soft slots index rows of ``soft`` [S, D].

    Without ``soft``, these are the tokens themselves: some LMs look up more than their embeddings (Gemma 3n and 4).

    Args:
        left: the padding is on the left.
    """
    if soft is None:
        return tokens
    hard = embed(tokens)  # [B, T, D]
    slots = torch.full(tokens.shape, -1)  # [B, T], rows of ``soft``, -1 for a token
    for slot, row in zip(slots, rows, strict=True):
        if row.soft_slots:
            start = len(slot) - len(row) if left else 0
            slot[[start + position for position in row.soft_slots]] = torch.tensor(list(row.soft_slots.values()))
    slots = slots.to(tokens.device)
    return torch.where((slots >= 0).unsqueeze(-1), soft.to(hard.device, hard.dtype)[slots.clamp(min=0)], hard)


def fed(rows: Tensor) -> dict[str, Tensor]:
    """Tokens [B, T] or input embeddings [B, T, D] as an argument of a forward pass."""
    return {"inputs_embeds" if rows.is_floating_point() else "input_ids": rows}


def positions(real: Tensor) -> Tensor:
    """Position ids [B, T] that count real tokens only."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def context_length(config: Any) -> int | None:
    """The longest row that a model of this config reads; None if nothing limits it."""
    text = config.get_text_config(decoder=True)
    return next((int(found) for key in CONTEXT_KEYS if (found := getattr(text, key, None))), None)


def check_context(config: Any, longest: int, what: str = "a row has") -> None:
    """Raise a ValueError if rows of ``longest`` tokens do not fit into the model's context."""
    context = context_length(config)
    if context and longest > context:
        raise ValueError(
            f"{what} {longest} tokens, more than the model's context of {context}; lower max_prompt_tokens or max_history"
        )
