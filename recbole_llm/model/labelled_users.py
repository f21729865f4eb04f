"""The labelled validation users by whom methods of merging choose weights, and their scores under a mixture of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.ranks import target_ranks
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.packing import token_batches
from recbole_llm.merging.calibration import cross_entropies
from recbole_llm.merging.objectives import mean_over_batches
from recbole_llm.model.eval_users import EvalBatch

Compute = Callable[[Callable[..., Any]], Callable[..., Any]]


class LabelledUsers:
    """Validation users whose target is among their candidates; see :class:`recbole_llm.merging.lattice.Labelled`.

    Attributes:
        histories, candidates, slots: of N users: N lists, ``[N, C]``, and the places of the targets, ``[N]``.

    Args:
        drawn: the users; those whose target a retriever missed are left out, since no weights change their metric.
        metric: ``valid_metric`` in lower case.
        likelihood: scores candidates.
        at: the LM at weights ``[K]`` or ``[M, K]``.
        batch_tokens: of a forward pass with gradients.
        compute: wraps the functions that run the LM.
    """

    def __init__(
        self,
        drawn: EvalBatch,
        metric: str,
        likelihood: TitleLikelihood,
        at: Callable[[Tensor], Any],
        batch_tokens: int,
        compute: Compute = lambda run: run,
    ):
        target = drawn.candidates == drawn.targets[:, None]  # [N, C]
        found = target.any(1)  # [N]
        self.histories = [history for history, kept in zip(drawn.histories, found.tolist(), strict=True) if kept]
        self.candidates, self.slots = drawn.candidates[found], target[found].int().argmax(1)  # [N, C], [N]
        self._users = [user for user, kept in zip(drawn.users, found.tolist(), strict=True) if kept]
        self._metric, self.likelihood, self._at, self._batch_tokens = metric, likelihood, at, batch_tokens
        self._run, self._loss = compute(self._scores), compute(self._batch_loss)

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

    def values(self, scores: Tensor) -> Tensor:
        """The metric ``[N]`` of each user."""
        ranks, _ = target_ranks(scores, self.slots)
        return torch.tensor(
            [metrics.metrics([rank], [self._metric])[self._metric] for rank in ranks.tolist()], dtype=torch.double
        )

    def cross_entropy(self, users: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Mean cross-entropy (nats) of the targets of these users, by weights; differentiable, with the memory of one batch."""
        lengths = self.likelihood.tokens([self.histories[user] for user in users], self.candidates[list(users)])
        batches = [[users[i] for i in batch] for batch in token_batches(*lengths, self._batch_tokens)]
        return mean_over_batches(self._loss, batches)

    def _scores(self, weights: Tensor) -> Tensor:
        return self.likelihood.with_lm(self._at(weights))(self.histories, self.candidates, self._users)

    def _batch_loss(self, weights: Tensor, users: Sequence[int]) -> Tensor:
        rows = torch.tensor(users)
        view = self.likelihood.with_lm(self._at(weights))
        scores = view([self.histories[user] for user in users], self.candidates[rows], [self._users[user] for user in users])
        return cross_entropies(scores, self.slots[rows].to(scores.device)).mean()
