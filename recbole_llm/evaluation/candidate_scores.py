"""Scores of candidates by a RecBole model, at the cost of the candidates where it scores by products of vectors.

Legend: B users, C candidates, I items, D width of the vectors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recbole_llm.evaluation import ranks
from recbole_llm.evaluation.products import Products
from recbole_llm.evaluation.ranks import gather_scores, in_parts
from recbole_llm.store.random_state import preserved_random_state

CHECKED = 13
"""Users by whom a model is checked for products, at most. No usual width, so a matrix [D, I] is not taken for rows of users."""


class CandidateScores:
    """Scores [B, C] of candidates [B, C] by a RecBole model in ``eval()``, equal to its full ranking up to rounding.

    The first batch of two or more users tells whether the model scores by products (:mod:`recbole_llm.evaluation.products`), at
    the cost of scoring the catalogue for a few of them. If it does, only the candidates are scored; if not, or if users' vectors
    are made of as many numbers as there are scores, see :func:`~recbole_llm.evaluation.ranks.gather_scores`. The vectors are
    those of each batch, but the bias of items is that of the check: make a new object when the weights have changed.

    Args:
        model: the model.
        item_field: the field of an interaction that has the items.
    """

    def __init__(self, model: Any, item_field: str):
        self._model, self._item_field = model, item_field
        self._products: Products | None = None
        self._checked = False

    def __call__(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] of candidates [B, C] of a RecBole interaction, both on the model's device."""
        number = candidates.size(1)
        if number < self._model.n_items and (products := self._found(interaction)) is not None:
            # so many users at once that there are SCORES products of two numbers
            return in_parts(self._part, interaction, candidates, ranks.SCORES // (number * products.vectors.size(1)))
        return gather_scores(self._model, interaction, candidates, self._item_field)

    def _found(self, interaction: Any) -> Products | None:
        if not self._checked and len(interaction) > 1:
            items = self._model.n_items
            few = interaction[: min(CHECKED, max(2, ranks.SCORES // items))]
            with preserved_random_state():  # the check is no part of the scores
                found, self._checked = Products.of(self._model.full_sort_predict, few, items), True
            self._products = None if found is None or found.reads_rows else found
        return self._products

    def _part(self, interaction: Any, candidates: Tensor) -> Tensor:
        scores = None if self._products is None else self._products.scores(interaction, candidates)
        return gather_scores(self._model, interaction, candidates, self._item_field) if scores is None else scores
