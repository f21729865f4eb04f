"""One vector per prompt: a causal LM's last hidden state at the last token, or its mean over all tokens.

Legend: B rows, T tokens, S soft tokens, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.forward import left_padded
from recbole_llm.llm.packing import equal_lengths


def encode(
    lm: Any, rows: Sequence[Prompt], pad_token_id: int | None, *, soft: Tensor | None = None, mean: bool = False
) -> Tensor:
    """Hidden states [B, D] in fp32 after the LM's final norm; differentiable in ``soft``. ``lm_head`` does not run.

    Args:
        rows: of any lengths; their soft slots index rows of ``soft`` [S, D].
        pad_token_id: None does not pad: rows of equal lengths are computed together.
        mean: average over all tokens of a row instead of the last token's state.

    Raises:
        ValueError: a row is empty or longer than the model's context.
    """
    if not rows or not all(map(len, rows)):
        raise ValueError("a row has no tokens; check the prompt template")
    if pad_token_id is None:
        groups = equal_lengths(rows)
        found = [encode(lm, [rows[i] for i in group], 0, soft=soft, mean=mean) for group in groups]
        return torch.cat(found)[torch.tensor([i for group in groups for i in group]).argsort()]  # [B, D]
    inputs, _, real = left_padded(lm, rows, pad_token_id, soft)  # real: [B, T]
    hidden = lm.base_model(**inputs).last_hidden_state  # [B, T, D]
    if not mean:
        return hidden[:, -1].float()  # [B, D]
    real = real.to(hidden.device)
    return (hidden.float() * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)  # [B, D]
