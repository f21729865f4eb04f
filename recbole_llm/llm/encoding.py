"""One vector for a prompt: the last hidden state of a causal LM at its last token, or the mean over its tokens.

Rows are padded on the left, with a mask and with positions that count real tokens only, so that the last token stands in
the last column of every row and padding changes nothing. ``lm_head`` never runs.

Legend: B rows, T tokens, S soft tokens, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.forward import embedded, positions
from recbole_llm.llm.packing import pad_left


def encode(lm: Any, rows: Sequence[Prompt], pad_token_id: int, *, soft: Tensor | None = None, mean: bool = False) -> Tensor:
    """Hidden states [B, D] in fp32 after the LM's final norm; differentiable in ``soft``.

    rows: of any lengths; their soft slots name rows of ``soft`` [S, D], see :func:`~recbole_llm.llm.scoring.embedded`.
    mean: average over all tokens of a row instead of reading the last one.
    Raises ValueError where a row is empty or longer than the model's context.
    """
    longest, context = max(map(len, rows), default=0), getattr(lm.config, "max_position_embeddings", None)
    if not longest or not all(map(len, rows)):
        raise ValueError("a row has no tokens, so there is nothing to encode; check the prompt template")
    if context and longest > context:
        raise ValueError(f"a row has {longest} tokens, the model has room for {context}; lower max_prompt_tokens or max_history")
    embed = lm.get_input_embeddings()
    tokens, seen = pad_left([torch.tensor(row.ids, device=embed.weight.device) for row in rows], pad_token_id)  # [B, T]
    hidden = lm.base_model(
        inputs_embeds=embedded(embed, tokens, rows, soft),
        attention_mask=seen.long(),
        position_ids=positions(seen),
        use_cache=False,
    ).last_hidden_state  # [B, T, D]
    if not mean:
        return hidden[:, -1].float()  # [B, D]
    real = seen.unsqueeze(-1)  # [B, T, 1]
    return (hidden.float() * real).sum(1) / real.sum(1)  # [B, D]
