"""Rows of different lengths as tensors: padding, batches under a token budget, candidate branches behind one prompt.

The packed tree is the candidate-isolation mask of SpecInfer and of multi-item scoring: the answers of a user stand in
one row, each sees the prompt and itself, and each believes that it follows the prompt directly.

Legend: B users, C candidates, L prompt tokens, A answer tokens, S answer tokens fed per user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def token_batches(lengths: Sequence[int], extras: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches whose padded size, rows x (longest length + largest extra), stays within ``budget``.

    Longest first, so that little is padded and a batch too large for the memory fails at once; a row that exceeds the
    budget alone is a batch of its own.
    """
    batches: list[list[int]] = []
    length = extra = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, extra = max(length, lengths[i]), max(extra, extras[i])
        if batches and (len(batches[-1]) + 1) * (length + extra) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            length, extra = lengths[i], extras[i]
    return batches


def pad_left(rows: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [T, ...] with ``pad`` before them, so that all end together: ([B, T, ...], real [B, T] bool)."""
    padded = pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side="left")  # [B, T, ...]
    lengths = torch.tensor([len(row) for row in rows], device=padded.device).unsqueeze(-1)  # [B, 1]
    return padded, torch.arange(padded.shape[1], device=padded.device) >= padded.shape[1] - lengths


def pad_answers(answers: Sequence[Sequence[Sequence[int]]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """B x C answers with ``pad`` after them: (tokens [B, C, A], real [B, C, A] bool)."""
    lengths = torch.tensor([[len(answer) for answer in row] for row in answers], device=device)  # [B, C]
    width = int(lengths.max())
    tokens = torch.tensor(
        [[[*answer, *[pad] * (width - len(answer))] for answer in row] for row in answers], device=device
    )  # [B, C, A]
    return tokens, torch.arange(width, device=device) < lengths.unsqueeze(-1)


@dataclass(frozen=True)
class Branches:
    """The answers of each user, without their last tokens, one after the other in a row of S slots.

    tokens, owner (candidate, -1 in a hole), depth (position inside the answer): LongTensor[B, S].
    slots: LongTensor[B, C, A - 1], where in the row the j-th fed token of an answer stands (anywhere, if it has none).
    """

    tokens: Tensor
    owner: Tensor
    depth: Tensor
    slots: Tensor

    @classmethod
    def of(cls, tokens: Tensor, real: Tensor) -> Branches:
        """Pack tokens [B, C, A] where ``real`` [B, C, A]; an answer of n tokens takes n - 1 slots."""
        fed = real[..., 1:]  # [B, C, A - 1]
        number = fed.sum(-1)  # [B, C]
        depth = torch.arange(fed.shape[-1], device=tokens.device).expand_as(fed)  # [B, C, A - 1]
        start = number.cumsum(-1) - number  # [B, C]
        slots = start.unsqueeze(-1) + depth  # [B, C, A - 1]
        users, owner, _ = where = fed.nonzero(as_tuple=True)  # 3 x [fed tokens]
        width = int(number.sum(-1).max())

        def packed(values: Tensor, hole: int) -> Tensor:
            row = values.new_full((len(tokens), width), hole)  # [B, S]
            row[users, slots[where]] = values
            return row

        return cls(
            packed(tokens[..., :-1][where], int(tokens[0, 0, 0])),
            packed(owner, -1),
            packed(depth[where], 0),
            slots.clamp(max=width - 1),
        )

    def visible(self, prompt: Tensor) -> Tensor:
        """Who sees whom, BoolTensor[B, S, L + S]: the real tokens ``prompt`` [B, L], and the branch so far."""
        width = self.owner.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=prompt.device).tril()  # [S, S]
        own = (self.owner.unsqueeze(-1) == self.owner.unsqueeze(-2)) & causal  # [B, S, S]
        return torch.cat([prompt.unsqueeze(1).expand(-1, width, -1), own], dim=-1)  # [B, S, L + S]
