"""The evaluation users of a phase, on whom early stopping and merging measure a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.histories import drawn_users
from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.ranks import target_ranks, target_slots

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.histories import Histories

Score = Callable[[Sequence[Sequence[int]], Tensor, Sequence[int]], Tensor]
"""Histories, candidates [N, C] and user ids -> scores [N, C]."""


class EvalBatch(NamedTuple):
    """N users: internal ids [N], histories, candidates [N, C] and targets [N]."""

    users: list[int]
    histories: list[list[int]]
    candidates: Tensor
    targets: Tensor


class EvalUsers:
    """The users of a phase with their candidates, in an order drawn from ``seed``.

    Args:
        metric: the metric of :meth:`score`, by RecBole's name in lower case (``valid_metric``).
        number: its number of users.
    """

    def __init__(self, candidates: CandidateSet, histories: Histories, phase: str, *, seed: int, metric: str, number: int):
        self._candidates, self._histories, self._phase = candidates, histories, phase
        self._metric, self._number, self._seed = metric, number, seed
        everyone = len(candidates.users)
        self._order = torch.from_numpy(drawn_users(np.arange(everyone), seed, everyone))

    @property
    def fingerprint(self) -> str:
        """Identifies everything that determines the score besides the model."""
        shown = sha256()
        for user in self._candidates.users.tolist():
            history = self._histories.before(user, self._phase)
            shown.update(len(history).to_bytes(8, "little") + history.astype("<i8").tobytes())
        parts = self._candidates.identity, shown.hexdigest(), len(self._order), self._seed, self._metric, self._number
        return "/".join(map(str, parts))

    def draw(self, number: int) -> EvalBatch:
        """The first ``number`` users of the order, or all if there are fewer."""
        chosen = self._order[:number]
        users = self._candidates.users[chosen].tolist()
        histories = [self._histories.before(user, self._phase).tolist() for user in users]
        return EvalBatch(users, histories, self._candidates.items[chosen], self._candidates.targets[chosen])

    @torch.no_grad()
    def score(self, score: Score) -> float:
        """The metric of the targets among their candidates; NaN if any score is not finite."""
        users, histories, candidates, targets = self.draw(self._number)
        scores = score(histories, candidates, users).cpu()  # [N, C]
        if not torch.isfinite(scores).all():
            return math.nan
        ranks, _ = target_ranks(scores, *target_slots(candidates, targets))  # [N]
        return metrics.metrics(ranks.tolist(), [self._metric])[self._metric]
