"""The evaluated users of a phase in a drawn order: what early stopping scores and what a merge is measured on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.candidates import CandidateSet

if TYPE_CHECKING:
    from recbole_llm.model.ranker import LLMRanker


class Asked(NamedTuple):
    """N users as a ranker is asked about them: ids [N], histories, candidates [N, C] and targets [N]."""

    users: list[int]
    histories: list[list[int]]
    candidates: Tensor
    targets: Tensor


class EvalUsers:
    """The users of a phase with their candidates, in an order drawn by the run's seed: for early stopping and merging."""

    def __init__(self, model: LLMRanker, phase: str, candidates: CandidateSet):
        self._model, self._phase, self._candidates = model, phase, candidates
        self._order = torch.from_numpy(np.random.default_rng(model.seed).permutation(len(candidates.users)))

    @property
    def fingerprint(self) -> str:
        """What the order and the candidates depend on."""
        return f"{self._candidates.sha256}/{len(self._order)}/{self._model.seed}"

    def draw(self, number: int) -> Asked:
        """At most ``number`` users of the drawn order."""
        chosen = self._order[:number]
        users = self._candidates.users[chosen].tolist()
        histories = [self._model.histories.before(user, self._phase).tolist() for user in users]
        return Asked(users, histories, self._candidates.items[chosen], self._candidates.targets[chosen])

    @torch.no_grad()
    def score(self) -> float:
        """Mean NDCG of the target over all candidates, ``1 / log2(1 + rank)``, of ``valid_users`` users."""
        users, histories, candidates, targets = self.draw(self._model.valid_users)
        scores = self._model.score_histories(histories, candidates, users).cpu()  # [N, C]
        if not torch.isfinite(scores).all():
            return math.nan
        target = candidates == targets[:, None]  # [N, C]; no slot where a retriever missed it
        own = scores.masked_fill(~target, -torch.inf).amax(1, keepdim=True)  # [N, 1]
        better = (scores > own).sum(1) + 0.5 * ((scores == own).sum(1) - 1)  # [N]
        return float((target.any(1) / torch.log2(2 + better)).mean())
