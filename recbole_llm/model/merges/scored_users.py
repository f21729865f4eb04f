"""Validation users whose target is among their candidates, and their scores under a mixture of adapters.

It reads their labels only to find them: a stage of scores needs no more of :mod:`recbole_llm.model.merges.labelled_users`.

Legend: K adapters, M adapted modules, N users, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recbole_llm.evaluation.ranks import target_slots
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.model.eval_users import EvalBatch

Compute = Callable[[Callable[..., Any]], Callable[..., Any]]


class ScoredUsers:
    """Users with scores.

    Attributes:
        histories, candidates, slots: of N users: N lists, ``[N, C]``, and the places of the targets, ``[N]``.

    Args:
        drawn: the users; those whose target a retriever missed are left out, since no weights change their metric.
        likelihood: scores candidates.
        at: the LM at weights ``[K]`` or ``[M, K]``.
        compute: wraps the functions that run the LM.
    """

    def __init__(
        self,
        drawn: EvalBatch,
        likelihood: TitleLikelihood,
        at: Callable[[Tensor], Any],
        compute: Compute = lambda run: run,
    ):
        slots, missed = target_slots(drawn.candidates, drawn.targets)
        rows = (~missed).nonzero().flatten()  # [N]
        self.candidates, self.slots = drawn.candidates[rows], slots[rows]  # [N, C], [N]
        self.histories, self._users = [drawn.histories[row] for row in rows], [drawn.users[row] for row in rows]
        self.likelihood, self._at = likelihood, at
        self._run = compute(self._scores)

    def __len__(self) -> int:
        return len(self.slots)

    @torch.no_grad()
    def scores(self, weights: Tensor) -> Tensor:
        """Scores ``[N, C]`` on the CPU.

        Raises:
            ValueError: one of them is not finite, or there are no users.
        """
        if not len(self):
            raise ValueError("merge: no validation target is among its candidates; give more candidates, or merge: entropy")
        scores = self._run(weights).cpu().expand(self.candidates.shape)  # in the count of costs, a single 0
        if not torch.isfinite(scores).all():
            raise ValueError(f"merge: a score is not finite at the weights {weights.tolist()}; is an adapter damaged?")
        return scores

    def _scores(self, weights: Tensor) -> Tensor:
        return self.likelihood.with_lm(self._at(weights))(self.histories, self.candidates, self._users)
