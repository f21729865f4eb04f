"""Base class of LLM encoders: one vector for each user and item, whose products rank the whole catalogue.

::

    interaction (item_id_list, item_length) --> encode_users --> [B, D] --+
                                                                          x --> scores [B, I]
    the catalogue, once --------------------> encode_items --> [I, D] ----+

Vectors have unit length, so a score is a cosine. Item vectors are cached; a user costs one forward pass and I products.

Legend: B users, C candidates, I items, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_llm.data.histories import drawn_users
from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.full_ranking import RandomTies, mask
from recbole_llm.evaluation.ranks import target_ranks
from recbole_llm.evaluation.recommender import Facts, StagedRecommender, Variant
from recbole_llm.llm.backbones import Backbone
from recbole_llm.model.parts import Parts, histories_of

EncodeHistories = Callable[[Sequence[Sequence[int]]], Tensor]
"""Histories of internal item ids, oldest first -> vectors [B, D] of unit length."""


class LLMEncoder(StagedRecommender, SequentialRecommender):
    """Base of models that rank the catalogue by the cosine of user and item vectors."""

    uses_item_text = True
    scores_unseen_items = True
    scores_full_catalogue = True

    parts: Parts

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.item_matrix = torch.empty(0)  # [I, D], set when the model is loaded

    def __str__(self) -> str:
        return f"{type(self).__name__}, backbone {self.parts.backbone.name}"

    @property
    def backbone(self) -> Backbone:
        return self.parts.backbone

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """User vectors [B, D] of unit length for histories of internal item ids, oldest first."""
        raise NotImplementedError

    def encode_users(self, interaction: Any) -> Tensor:
        """User vectors [B, D] for a RecBole interaction."""
        return self.encode_histories(histories_of(self, interaction))

    def encode_items(self) -> Tensor:
        """Computes item vectors [I, D] of unit length; row 0, the padding item, is zero."""
        raise NotImplementedError

    def facts(self) -> Facts:
        backbone = self.parts.backbone
        return Facts(backbone.name, backbone.fingerprint, backbone_identity=backbone.identity, builtin=backbone.builtin)

    def variants(self) -> dict[str, Variant]:
        """The model; its scores are not cached, since they cost only one forward pass for each user."""
        return {type(self).__name__: Variant(self.score_candidates, self.full_sort_predict)}

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Cosines [B, I] of users with the whole catalogue."""
        return self.encode_users(interaction) @ self.item_matrix.T  # [B, I]

    @torch.no_grad()
    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Cosines [B, C] of users with their candidates [B, C]."""
        users, items = self.encode_users(interaction), self.item_matrix[candidates]  # [B, D], [B, C, D]
        return torch.einsum("bd,bcd->bc", users, items)

    @torch.no_grad()
    def recommend(self, interaction: Any, k: int) -> tuple[Tensor, Tensor]:
        """Scores and internal ids, both [B, k], of each user's k best items, best first; all items if there are fewer.

        Exact, by ``faiss.IndexFlatIP``, which does not store [B, I] scores. Items of the history are included, as the
        interaction does not have the whole history.
        """
        import faiss

        index = faiss.IndexFlatIP(self.item_matrix.size(1))
        index.add(np.ascontiguousarray(self.item_matrix[1:].cpu().numpy()))  # without the padding item
        users = np.ascontiguousarray(self.encode_users(interaction).cpu().numpy())
        scores, items = index.search(users, min(k, index.ntotal))
        return torch.from_numpy(scores), torch.from_numpy(items) + 1

    def valid_users(self) -> list[int]:
        """The users of :meth:`valid_score`, drawn from the run's seed."""
        return drawn_users(self.parts.histories.evaluated("valid"), self.parts.seed, self.parts.validation.users).tolist()

    @torch.no_grad()
    def valid_score(self, encode: EncodeHistories, item_matrix: Tensor) -> float:
        """``valid_metric`` of ``valid_users`` users under full ranking against an item matrix [I, D]; NaN if any score is NaN."""
        users, metric, histories = self.valid_users(), self.parts.validation.metric, self.parts.histories
        targets = torch.tensor([histories.target(user, "valid") for user in users], device=item_matrix.device)  # [N]
        known = [histories.before(user, "valid") for user in users]
        scores = encode([history.tolist() for history in known]) @ item_matrix.T  # [N, I]
        if scores.isnan().any():
            return float("nan")
        rows = np.repeat(np.arange(len(users)), [len(history) for history in known])  # [H]
        history = torch.from_numpy(rows), torch.from_numpy(np.concatenate(known))
        scores = mask(scores, history if self.parts.validation.masked else None)
        scores[:, sorted(histories.scenario.new)] = -torch.inf  # which occur at test alone
        ties = RandomTies(histories.user_ids, histories.item_ids)
        ranks, _ = target_ranks(ties(scores, torch.tensor(users), 1, targets), targets)
        return metrics.metrics(ranks.tolist(), [metric])[metric]
