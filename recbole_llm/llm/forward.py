"""What training, scoring and encoding share of a pass through a causal LM: input embeddings, positions, and the loss.

Legend: B rows, T tokens, S soft tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.packing import pad_left


def lm_loss(model: Any, examples: Sequence[Example], pad_token_id: int, *, soft: Tensor | None = None) -> Tensor:
    """Mean next-token loss, in nats, over the answers of examples; what precedes the first answer gets no logits.

    examples: of any lengths; soft slots name rows of ``soft`` [S, D] and are never targets, nor is a row's first token.
    Raises ValueError if no example has an answer.
    """
    embed = model.get_input_embeddings()
    rows = [example.row for example in examples]
    tokens, seen = pad_left([torch.tensor(row.ids, device=embed.weight.device) for row in rows], pad_token_id)  # [B, T]
    wanted, _ = pad_left([torch.tensor(example.mask, device=seen.device) for example in examples])  # [B, T]
    inputs = embedded(embed, tokens, rows, soft)  # [B, T, D]
    wanted = wanted[:, 1:].bool() & seen[:, :-1]  # [B, T - 1]
    if not wanted.any():
        raise ValueError("no row has an answer token after its first, so there is no loss; check the answer mask")
    keep = wanted.shape[1] - int(wanted.any(0).int().argmax())  # columns from the first target of any row on
    logits = model(
        inputs_embeds=inputs,
        attention_mask=seen.long(),
        position_ids=positions(seen),
        use_cache=False,
        logits_to_keep=keep + 1,
    ).logits[:, :-1]  # [B, keep, V]
    wanted = wanted[:, -keep:]  # [B, keep]
    return F.cross_entropy(logits[wanted].float(), tokens[:, -keep:][wanted])


def embedded(embed: Any, tokens: Tensor, rows: Sequence[Prompt], soft: Tensor | None = None) -> Tensor:
    """Input embeddings [B, T, D] of rows that are padded on the left to tokens [B, T]; soft slots read ``soft`` [S, D]."""
    hard = embed(tokens)  # [B, T, D]
    if soft is None:
        return hard
    slots = torch.full(tokens.shape, -1)  # [B, T], the row of ``soft`` that is read there, -1 where none is
    for slot, row in zip(slots, rows, strict=True):
        if row.soft_slots:
            start = len(slot) - len(row)
            slot[[start + position for position in row.soft_slots]] = torch.tensor(list(row.soft_slots.values()))
    slots = slots.to(tokens.device)
    return torch.where((slots >= 0).unsqueeze(-1), soft.to(hard.device, hard.dtype)[slots.clamp(min=0)], hard)


def positions(seen: Tensor) -> Tensor:
    """Position ids [B, L] that count real tokens only, so that padding moves nobody."""
    return (seen.cumsum(-1) - 1).clamp(min=0)
