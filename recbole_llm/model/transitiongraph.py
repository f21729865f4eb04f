"""TransitionGraph: the items that followed the user's latest items in the training split.

Sequential rules (Kamehkhosh, Jannach, Ludewig, TempRec at RecSys 2017; Ludewig & Jannach, UMUAI 28, 2018, arXiv 1803.09587): an
item leads to each of the next ``transition_steps`` items of the same user, with weight 1 / d over d steps. Han et al. (arXiv
2605.07125) report that a heuristic on the graph of transitions, read from the last one or two items, is competitive on 10 of 14
datasets. It also ranks by item features, which are separate models here. A row of the graph is smoothed by the popularity of
items (Dirichlet prior), so that an item with few transitions is close to popularity::

    P(j | i) = (n_ij + s p_j) / (n_i + s),    score(j) = sum_k w_k P(j | i_k)

n_ij is the weight of transitions from i to j, n_i their sum, p_j the share of j in the training interactions, s ``smoothing``,
i_k the k-th latest item. If a history has fewer items than are read, popularity replaces the missing ones.

Legend: B users, I items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from recbole_llm.data.training_rows import TrainingRows
from recbole_llm.model.shortcut import LatestItems, Shortcut
from recbole_llm.store.stages import StageCache


class TransitionGraph(Shortcut):
    """Smoothed transition probabilities from the latest items."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.latest = LatestItems.of(config)
        self.steps, self.smoothing = config["transition_steps"], config["smoothing"]

    def load(self, cache: StageCache) -> None:
        """Count the transitions."""
        super().load(cache)
        self.graph = transition_weights(self.rows, self.n_items, self.steps, self.latest.recency)  # [I, I]
        self.totals = np.asarray(self.graph.sum(1)).ravel()  # [I]

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        chosen = self.weighted_history(interaction, self.latest)  # [B, I]
        chosen.data /= self.totals[chosen.indices] + self.smoothing
        prior = np.asarray(chosen.sum(1)) * self.smoothing * self.popularity / self.popularity.sum()  # [B, I]
        return (chosen @ self.graph).toarray() + prior


def transition_weights(rows: TrainingRows, number: int, most: int, recency: float) -> csr_matrix:
    """Transitions between ``number`` items over 1 to ``most`` steps, over d steps with weight d ** -recency: float32 [I, I]."""
    graph = csr_matrix((number, number), dtype=np.float32)
    for before, after, steps in rows.transitions(most):
        graph += csr_matrix((steps.astype(np.float32) ** -recency, (before, after)), graph.shape)
    return graph
