"""The labelled validation users by whom methods of merging choose weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.ranks import target_ranks
from recbole_llm.llm.forward import loss_scale
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.packing import token_batches
from recbole_llm.merging.calibration import cross_entropies
from recbole_llm.merging.objectives import mean_over_batches
from recbole_llm.model.eval_users import EvalBatch
from recbole_llm.model.merges.scored_users import Compute, ScoredUsers


class LabelledUsers(ScoredUsers):
    """Users with scores, metric and loss; see :class:`recbole_llm.merging.lattice.Labelled`.

    Args:
        drawn, likelihood, at, compute: as of :class:`ScoredUsers`.
        metric: ``valid_metric`` in lower case.
        batch_tokens: of a forward pass with gradients.
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
        super().__init__(drawn, likelihood, at, compute)
        self._metric, self._batch_tokens, self._loss = metric, batch_tokens, compute(self._batch_loss)

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
        return mean_over_batches(self._loss, batches, scale=loss_scale(self.likelihood.lm))

    def _batch_loss(self, weights: Tensor, users: Sequence[int]) -> Tensor:
        rows = torch.tensor(users)
        view = self.likelihood.with_lm(self._at(weights))
        scores = view([self.histories[user] for user in users], self.candidates[rows], [self._users[user] for user in users])
        return cross_entropies(scores, self.slots[rows].to(scores.device)).mean()
