"""NearestTitles: the items whose titles share rare words with the titles of the user's latest items.

Titles are TF-IDF vectors (scikit-learn's, of lower-case words) of unit length; an item scores the mean cosine with the latest
items, weighted by recency. If this rule finds a target, a language model may have found it by the same words.

Legend: B users, K latest items, I items, V words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from recbole_llm.model.shortcut import TIE_BREAK, LatestItems, Shortcut
from recbole_llm.store.stages import StageCache


class NearestTitles(Shortcut):
    """Cosines of TF-IDF vectors of titles."""

    uses_item_text = True
    scores_unseen_items = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.latest = LatestItems.of(config)
        self.titles = dataset.item_texts.titles

    def load(self, cache: StageCache) -> None:
        """Count the words of the titles."""
        super().load(cache)
        self.vectors = title_vectors(self.titles)  # [I, V]

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        profiles = self.weighted_history(interaction, self.latest) @ self.vectors
        return (profiles @ self.vectors.T).toarray() + TIE_BREAK * self.popularity


def title_vectors(titles: list[str]) -> csr_matrix:
    """TF-IDF vectors [I, V] of unit length; zero for a title without words.

    Raises:
        ValueError: no title has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32).fit_transform(titles)
    except ValueError as error:
        raise ValueError(f"title_field: no title has a word that could be compared ({error})") from error
