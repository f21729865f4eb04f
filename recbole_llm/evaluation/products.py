"""Which models score by products of a user's and an item's vector, and these vectors. The one place that knows it.

There is no list of models. While a model scores the catalogue for a few users, the first matrix product with a vector of each
item is intercepted. The model is one of products if its scores are equal to these products, or differ by the same constant of an
item for each user, its bias. So this holds for any model, users' own included, and is checked for each run that is loaded and
each evaluation.

What is not intercepted (another function than those of :data:`_PRODUCTS` and ``linear``, a product of three dimensions, a
compiled model) or does not pass that check is scored like any other model, which only takes longer. A torch function
mode is in force only while one call of ``score_catalogue`` runs, and the call ends at the product, so nothing is patched.

Legend: B users, C candidates, I items, D width of the vectors.
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

TOLERANCE = 1e-6
"""Largest difference between scores and products, relative to the largest score: rounding of fp32."""

# torch.nn.functional.linear is apart, as its right factor is not transposed
_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


@dataclass(frozen=True)
class Products:
    """A model that scores by products.

    Attributes:
        vectors: of the items when the model was checked, [I, D] in fp32, without the bias.
        bias: of the items then, [I]; None without one.
        reads_rows: the users' vectors are made of a row [B, I], as an autoencoder's, so they cost as much as scores.
    """

    vectors: Tensor
    bias: Tensor | None
    reads_rows: bool
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
            users, items, reads_rows = found
            scores = score_catalogue(interaction).reshape(len(interaction), -1).float()
            if scores.size(1) != number:
                return None
            rest = (scores - users @ items.T)[:, 1:]  # [B, I - 1], without the padding item
            allowed = TOLERANCE * scores[:, 1:].abs().max()
            if rest.abs().max() <= allowed:  # False for NaN
                return cls(items, None, reads_rows, score_catalogue)
            # users of one vector have the same difference, whatever it is
            if (users != users[0]).any() and (rest - rest[0]).abs().max() <= allowed:
                bias = torch.cat([rest.new_zeros(1), rest.mean(0)])  # [I]
                return cls(items, bias, reads_rows, score_catalogue)
        return None

    @property
    def items(self) -> Tensor:
        """Vectors [I, D]; with a bias, it is the last column."""
        return self.vectors if self.bias is None else torch.cat([self.vectors, self.bias[:, None]], 1)

    def users(self, interaction: Any) -> Tensor:
        """Vectors [B, D] of an interaction, for products with :attr:`items`; the catalogue is not scored.

        Raises:
            RuntimeError: the model has scored by products when it was checked, and does not do so any more.
        """
        found: list[Tensor] = []
        while (done := sum(map(len, found))) < len(interaction):
            part = _intercepted(self._score, interaction[done:], len(self.vectors))
            if part is None or not 0 < len(part[0]) <= len(interaction) - done:
                raise RuntimeError(f"there is no product of the vectors of {len(interaction) - done} users")
            found.append(part[0])  # a retriever scores some users at once
        vectors = torch.cat(found)
        return vectors if self.bias is None else torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1)

    @torch.no_grad()
    def scores(self, interaction: Any, candidates: Tensor) -> Tensor | None:
        """Scores [B, C] of candidates [B, C]; None if the model does not multiply vectors of these users.

        Both vectors are those that the model multiplies now. Only the bias is that of the check. Each score is summed by itself,
        in the same order: candidates of equal vectors have equal scores, and those of a user do not depend on the others.
        """
        found = _intercepted(self._score, interaction, len(self.vectors))
        if found is None or len(found[0]) != len(candidates):
            return None
        users, items, _ = found
        scores = (users[:, None] * items[candidates]).sum(2)  # [B, C, D] -> [B, C]
        return scores if self.bias is None else scores + self.bias[candidates]


class _FoundError(Exception):
    """Ends the scoring at the product of vectors of users [B, D] and items [I, D]."""


class _Intercept(TorchFunctionMode):
    """Raises :class:`_FoundError` at the first product of a matrix with the transposed vectors of all items.

    Attributes:
        reads_rows: a tensor of a number for each user and item was made before.
    """

    def __init__(self, users: int, items: int):
        super().__init__()
        self._shape = users, items
        self.reads_rows = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) >= 2 and (func in _PRODUCTS or func is linear):
            left, right = args[:2]
            if left.dim() == right.dim() == 2:
                items = right if func is linear else right.T
                if len(items) == self._shape[1]:
                    raise _FoundError(left, items)
        result = func(*args, **(kwargs or {}))
        self.reads_rows |= isinstance(result, Tensor) and result.shape == self._shape
        return result


@torch.no_grad()
def _intercepted(score: Callable[[Any], Tensor], interaction: Any, number: int) -> tuple[Tensor, Tensor, bool] | None:
    """The vectors of users [B, D] and items [I, D] of the first product of both, in fp32; None if there is none.

    Then, whether there was a tensor [B, I] on the way.
    """
    mode = _Intercept(len(interaction), number)
    try:
        with mode:
            score(interaction)
    except _FoundError as found:
        users, items = found.args
        return users.detach().float(), items.detach().float(), mode.reads_rows
    return None
