"""Which models score by products of a user's and an item's vector, and these vectors. The one place that knows it.

There is no list of models. While a model scores the catalogue for a few users, the first matrix product with a vector of each
item is intercepted. The model is one of products if its scores are equal to these products, or differ by the same constant of an
item for each user, its bias. So this holds for any model, users' own included, and is checked for each run that is loaded.

Legend: B users, I items, D width of the vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-5
"""Largest difference between scores and products, relative to the largest score: rounding of fp32."""

_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


@dataclass(frozen=True)
class Products:
    """A model that scores by products.

    Attributes:
        items: vectors [I, D] in fp32; with a bias, the last column.
        biased: there is such a column.
    """

    items: Tensor
    biased: bool
    _score: Callable[[Any], Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, score_catalogue: Callable[[Any], Tensor], interaction: Any, number: int) -> Products | None:
        """The vectors of a model of ``number`` items; None if its scores of some users are not products.

        Args:
            score_catalogue: interaction of B users -> scores [B, I].
            interaction: of a few users, two or more: one user does not tell whether a difference is a bias.
        """
        with contextlib.suppress(NotImplementedError):  # a model of RecBole that scores item by item
            found = _intercepted(score_catalogue, interaction, number)
            if found is None or len(found[0]) != len(interaction) or len(interaction) < 2:
                return None
            users, items = found
            scores = score_catalogue(interaction).view(-1, number).float()
            rest = (scores - users @ items.T)[:, 1:]  # [B, I - 1], without the padding item
            allowed = TOLERANCE * scores[:, 1:].abs().max()
            if rest.abs().max() <= allowed:  # False for NaN
                return cls(items, False, score_catalogue)
            if (rest - rest[0]).abs().max() <= allowed:
                bias = torch.cat([rest.new_zeros(1), rest.mean(0)])  # [I]
                return cls(torch.cat([items, bias[:, None]], 1), True, score_catalogue)
        return None

    def users(self, interaction: Any) -> Tensor:
        """Vectors [B, D] of an interaction; the catalogue is not scored.

        Raises:
            RuntimeError: the model has scored by products when it was checked, and does not do so any more.
        """
        found: list[Tensor] = []
        while (done := sum(map(len, found))) < len(interaction):
            part = _intercepted(self._score, interaction[done:], len(self.items))
            if part is None or not 0 < len(part[0]) <= len(interaction) - done:
                raise RuntimeError(f"there is no product of the vectors of {len(interaction) - done} users")
            found.append(part[0])  # a retriever scores some users at once
        vectors = torch.cat(found)
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1) if self.biased else vectors


class _FoundError(Exception):
    """Ends the scoring at the product of vectors of users [B, D] and items [I, D]."""


class _Intercept(TorchFunctionMode):
    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) >= 2 and (func in _PRODUCTS or func is linear):
            left, right = args[:2]
            if left.dim() == right.dim() == 2:
                items = right if func is linear else right.T
                if len(items) == self._number:
                    raise _FoundError(left, items)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _intercepted(score: Callable[[Any], Tensor], interaction: Any, number: int) -> tuple[Tensor, Tensor] | None:
    """The vectors of users [B, D] and items [I, D] of the first product of both, in fp32; None if there is none."""
    try:
        with _Intercept(number):
            score(interaction)
    except _FoundError as found:
        users, items = found.args
        return users.detach().float(), items.detach().float()
    return None
