"""Base class of the shortcuts: models that train nothing, and show how far a simple rule gets on a dataset.

A shortcut has no parameters. It counts the training split or compares texts, and reads the histories that every sequential model
reads. Items that its rule does not distinguish are ordered by popularity, so candidates without evidence do not tie.

Legend: B users, C candidates, L longest history, K latest items, I items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from scipy.sparse import csr_matrix
from torch import Tensor

from recbole_llm.data.training_rows import TrainingRows
from recbole_llm.evaluation.ranks import SCORES, in_parts
from recbole_llm.evaluation.recommender import StagedRecommender, Variant
from recbole_llm.settings import Settings
from recbole_llm.store.stages import StageCache

TIE_BREAK = 1e-4
"""Weight of popularity beside similarities between -1 and 1: it decides between items that are equally similar."""


@dataclass(frozen=True)
class LatestItems(Settings):
    """What is read of a history.

    Args:
        number: of latest items.
        recency: the k-th latest item counts k ** -recency.
    """

    number: int
    recency: float

    KEYS: ClassVar[Mapping[str, str]] = {"number": "last_items"}

    @property
    def weights(self) -> np.ndarray:
        """Float32 [K], the last item first; their sum is 1."""
        weights = np.arange(1, self.number + 1, dtype=np.float32) ** -self.recency
        return weights / weights.sum()

    def matrix(self, items: Tensor, lengths: Tensor, number: int) -> csr_matrix:
        """The weights of the latest items of each history, as rows over ``number`` items: float32 [B, I], each row's sum is 1.

        Where a history is shorter than K, the padding item has the weights of the missing ones.

        Args:
            items, lengths: histories [B, L], oldest first, and their lengths [B].
        """
        places = lengths[:, None] - 1 - torch.arange(self.number, device=lengths.device)  # [B, K]
        latest = items.gather(1, places.clamp(min=0)).where(places >= 0, 0).cpu().numpy()  # [B, K]
        starts = np.arange(0, latest.size + 1, self.number)  # [B + 1]
        return csr_matrix((np.tile(self.weights, len(latest)), latest.ravel(), starts), (len(latest), number))


class Shortcut(StagedRecommender, SequentialRecommender):
    """Base of the shortcuts; they are evaluated at once, since no stage trains anything."""

    shortcut = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.rows = TrainingRows(dataset)

    def __str__(self) -> str:
        return f"{type(self).__name__}, an untrained shortcut"

    def load(self, cache: StageCache) -> None:
        """Count the training interactions of each item."""
        items, _ = self.rows.interactions
        counts = np.bincount(items, minlength=self.n_items)
        self.popularity = (counts / (counts.max() + 1)).astype(np.float32)  # [I], below 1

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        """Float32 scores [B, I] for a RecBole interaction."""
        raise NotImplementedError

    def weighted_history(self, interaction: Any, latest: LatestItems) -> csr_matrix:
        """:meth:`LatestItems.matrix` [B, I] of the histories of a RecBole interaction."""
        return latest.matrix(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], self.n_items)

    def variants(self) -> dict[str, Variant]:
        return {type(self).__name__: Variant(self.score_candidates, self.full_sort_predict)}

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue."""
        return torch.from_numpy(self.catalogue_scores(interaction)).to(self.device)

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] of candidates [B, C]; at the cost of the whole catalogue, unless a subclass reads their items alone."""

        def part(interaction: Any, candidates: Tensor) -> Tensor:
            return self.full_sort_predict(interaction).gather(1, candidates)  # [b, I] -> [b, C]

        return in_parts(part, interaction, candidates.to(self.device), SCORES // self.n_items)
