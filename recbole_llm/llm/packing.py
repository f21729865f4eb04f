"""Rows of different lengths as tensors: padding, batches under a token budget, candidate branches behind one prompt.

A packed tree holds all answers of a user in one row, as in SpecInfer and multi-item scoring. Each answer attends to the
prompt and to itself, and its positions follow those of the prompt.

Legend: B users, C candidates, L prompt tokens, A answer tokens, S answer tokens in a user's row.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def token_batches(
    lengths: Sequence[int],
    extras: Sequence[int],
    budget: int,
    *,
    extra_budget: int | None = None,
    padding: float = 1.0,
    least: int = 0,
) -> list[list[int]]:
    """Indices in batches whose padded size, rows x (longest length + largest extra), is at most ``budget``.

    Longest first: this limits padding, and running out of memory happens in the first batch. A row above the budget is a
    batch of its own.

    Args:
        lengths, extras: tokens of each row, which are padded apart, such as a prompt and its answers.
        budget: tokens, padding included.
        extra_budget: the largest rows x largest extra.
        padding: the largest share of a batch that is padding, of lengths or extras; 0 puts equal rows together alone.
        least: tokens up to which a batch may have any padding: a pass of fewer costs as much as its calls.
    """
    batches: list[list[int]] = []
    length = extra = real = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -extras[i])):
        length, extra, real = max(length, lengths[i]), max(extra, extras[i]), real + lengths[i] + extras[i]
        rows = len(batches[-1]) + 1 if batches else 0
        size = rows * (length + extra)
        full = size > budget or rows * extra > (extra_budget or size)
        if rows and not full and (size <= least or size - real <= padding * size):
            batches[-1].append(i)
        else:
            batches.append([i])
            length, extra, real = lengths[i], extras[i], lengths[i] + extras[i]
    return batches


def shared_batches(lengths: Sequence[int], budget: int, processes: int) -> list[list[int]]:
    """As :func:`token_batches`, for work that is dealt out in turn: each process gets about as many rows and tokens as others.

    Beyond an eighth of the budget, a batch ends rather than have more than a tenth of padding, which costs as much as tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = [order[first::processes] for first in range(min(processes, len(order)))]
    lots = [[lengths[i] for i in group] for group in groups]
    dealt = [token_batches(lot, [0] * len(lot), budget, padding=0.1, least=budget // 8) for lot in lots]
    owned = [[[group[i] for i in batch] for batch in batches] for group, batches in zip(groups, dealt, strict=True)]
    return [batch for turn in zip_longest(*owned) for batch in turn if batch]


def equal_lengths(rows: Sequence[Sized]) -> list[list[int]]:
    """Indices of rows, those of equal lengths together."""
    return token_batches([len(row) for row in rows], [0] * len(rows), sum(map(len, rows)) * len(rows), padding=0)


def common_start(rows: Sequence[list[int]]) -> int:
    """Number of tokens with which all rows begin."""
    first, last = min(rows), max(rows)  # in lexical order: what these share, all share
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def pad_left(rows: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [T, ...] padded on the left: ([B, T, ...], real [B, T] bool)."""
    padded = pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side="left")  # [B, T, ...]
    lengths = torch.tensor([len(row) for row in rows], device=padded.device).unsqueeze(-1)  # [B, 1]
    return padded, torch.arange(padded.shape[1], device=padded.device) >= padded.shape[1] - lengths


def pad_answers(answers: Sequence[Sequence[Sequence[int]]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """B x C answers padded on the right: (tokens [B, C, A], real [B, C, A] bool)."""
    lengths = torch.tensor([[len(answer) for answer in row] for row in answers], device=device)  # [B, C]
    width = int(lengths.max())
    tokens = torch.tensor(
        [[[*answer, *[pad] * (width - len(answer))] for answer in row] for row in answers], device=device
    )  # [B, C, A]
    return tokens, torch.arange(width, device=device) < lengths.unsqueeze(-1)


@dataclass(frozen=True)
class Branches:
    """The answers of each user, without their last tokens, concatenated in a row of S slots.

    Attributes:
        tokens: LongTensor[B, S].
        owner: the candidate of each token, -1 for padding: LongTensor[B, S].
        depth: the position of each token within its answer: LongTensor[B, S].
        slots: LongTensor[B, C, A - 1], the slot of the j-th token of an answer (any slot, if it has no such token).
    """

    tokens: Tensor
    owner: Tensor
    depth: Tensor
    slots: Tensor

    @classmethod
    def of(cls, tokens: Tensor, real: Tensor) -> Branches:
        """Pack tokens [B, C, A] where ``real`` [B, C, A]; an answer of n tokens fills n - 1 slots."""
        fed = real[..., 1:]  # [B, C, A - 1]
        number = fed.sum(-1)  # [B, C]
        depth = torch.arange(fed.shape[-1], device=tokens.device).expand_as(fed)  # [B, C, A - 1]
        start = number.cumsum(-1) - number  # [B, C]
        slots = start.unsqueeze(-1) + depth  # [B, C, A - 1]
        users, owner, _ = where = fed.nonzero(as_tuple=True)  # 3 x [fed tokens]
        width = int(number.sum(-1).max())

        def packed(values: Tensor, padding: int) -> Tensor:
            row = values.new_full((len(tokens), width), padding)  # [B, S]
            row[users, slots[where]] = values
            return row

        return cls(
            packed(tokens[..., :-1][where], int(tokens[0, 0, 0])),
            packed(owner, -1),
            packed(depth[where], 0),
            slots.clamp(max=width - 1),
        )

    def visible(self, prompt: Tensor) -> Tensor:
        """Attention mask, BoolTensor[B, S, L + S]: the real tokens ``prompt`` [B, L], and the own answer up to the token."""
        width = self.owner.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=prompt.device).tril()  # [S, S]
        own = (self.owner.unsqueeze(-1) == self.owner.unsqueeze(-2)) & causal  # [B, S, S]
        return torch.cat([prompt.unsqueeze(1).expand(-1, width, -1), own], dim=-1)  # [B, S, L + S]
