"""RecentPop: the most popular items of the recent past, at the time when the user comes back.

Ji, Sun, Zhang, Li, "A Re-visit of the Popularity Baseline in Recommender Systems", SIGIR 2020 (arXiv 2005.13829): popularity at
the time of an interaction is a far better baseline than popularity in the whole training split, which includes what happened
later. Here, the recent past of a user is a share of all training interactions, the last ones before the user's latest known item.

Legend: B users, C candidates, N training interactions, I items.
"""

from __future__ import annotations

from functools import cached_property
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.training_rows import time_fields
from recbole_llm.model.shortcut import Shortcut
from recbole_llm.store.stages import StageCache

logger = getLogger()


class RecentPop(Shortcut):
    """Items by their number of interactions in the recent past, then in the whole training split."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.share = config["recent_share"]
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
        return counts_between(self.items, *self._past(interaction), self.n_items) + self.popularity

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        listed, (starts, ends) = candidates.cpu().numpy(), self._past(interaction)  # [B, C], [B], [B]
        until, before = (np.searchsorted(self._events, self._event(listed, places[:, None])) for places in (ends, starts))
        counts = (until - before).astype(np.float32)  # [B, C]
        return torch.from_numpy(counts + self.popularity[listed]).to(self.device)

    @cached_property
    def _events(self) -> np.ndarray:
        """The training interactions [N] as numbers, by item, then by place in time."""
        return np.sort(self._event(self.items, np.arange(len(self.items))))

    def _event(self, items: np.ndarray, places: np.ndarray) -> np.ndarray:
        return items.astype(np.int64) * (len(self.items) + 1) + places

    def _past(self, interaction: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where each user's recent past starts [B] and ends [B] among the training interactions."""
        ends = np.searchsorted(self.times, self._now(interaction), side="right")  # [B]
        return np.maximum(ends - max(1, round(self.share * len(self.items))), 0), ends

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
