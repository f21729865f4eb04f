"""RecentPop: the most popular items of the recent past, at the time when the user comes back.

Ji, Sun, Zhang, Li, "A Re-visit of the Popularity Baseline in Recommender Systems", SIGIR 2020 (arXiv 2005.13829): popularity at
the time of an interaction is a far better baseline than popularity in the whole training split, which includes what happened
later. Here, the recent past of a user is a share of all training interactions, the last ones before the user's latest known item.

Legend: B users, N training interactions, I items.
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
import torch

from recbole_llm.data.training_rows import time_fields
from recbole_llm.model.shortcut import Shortcut
from recbole_llm.store.stages import StageCache

logger = getLogger()


class RecentPop(Shortcut):
    """Items by their number of interactions in the recent past, then in the whole training split."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.share = config["recent_share"]
        if not 0 < self.share <= 1:
            raise ValueError(f"recent_share: {self.share} is not a share; give a number above 0 and at most 1")
        self.time_field, _ = time_fields(config)

    def load(self, cache: StageCache) -> None:
        """Sort the training interactions by time."""
        super().load(cache)
        items, times = self.rows.interactions
        if times is None:
            logger.warning(f"RecentPop: the dataset has no times ({self.time_field}), so all of the training split is recent")
            times, self.share = np.zeros(len(items), dtype=np.float32), 1.0
        order = np.argsort(times, kind="stable")
        self.items, self.times = items[order], times[order]  # [N]

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        ends = np.searchsorted(self.times, self._now(interaction), side="right")  # [B]
        starts = np.maximum(ends - max(1, round(self.share * len(self.items))), 0)
        return counts_between(self.items, starts, ends, self.n_items) + self.popularity

    def _now(self, interaction: Any) -> np.ndarray:
        """The time of each user's latest item [B]; after the whole training split for a history without items or times."""
        lengths = interaction[self.ITEM_SEQ_LEN][:, None]  # [B, 1]
        if self.time_field not in interaction:
            return np.full(len(lengths), np.inf)
        last = interaction[self.time_field].gather(1, (lengths - 1).clamp(min=0))  # [B, 1]
        return last.where(lengths > 0, torch.inf).squeeze(1).cpu().numpy()


def counts_between(items: np.ndarray, starts: np.ndarray, ends: np.ndarray, number: int) -> np.ndarray:
    """How often each of ``number`` items occurs in ``items[starts[b] : ends[b]]``: float32 [B, I].

    The later a range ends, the later it must start: the ranges are one window that slides over items [N], so all of them cost
    2 N steps.
    """
    found = np.zeros((len(ends), number), dtype=np.float32)  # [B, I]
    counts = np.zeros(number, dtype=np.int64)
    start = end = int(starts.min(initial=len(items)))
    for row in np.argsort(ends, kind="stable").tolist():
        counts += np.bincount(items[end : ends[row]], minlength=number)
        counts -= np.bincount(items[start : starts[row]], minlength=number)
        start, end = starts[row], ends[row]
        found[row] = counts
    return found
