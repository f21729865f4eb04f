"""The contract of LLM encoders: one vector a user and one an item, whose product ranks the whole catalogue.

::

    interaction (item_id_list, item_length) --> encode_users --> [B, D] --+
                                                                          x --> scores [B, I]
    the catalogue, once --------------------> encode_items --> [I, D] ----+

Vectors have unit length, so a score is a cosine. The items' are kept; a user costs one pass through the LM and I products.

Legend: B users, C candidates, I items, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.evaluation import slices
from recbole_llm.model.base import LLMRecommender
from recbole_llm.store.files import fingerprint


class LLMEncoder(LLMRecommender):
    """Base of models that rank the catalogue by the cosine of user and item vectors."""

    scores_full_catalogue = True

    _item_matrix: Tensor | None = None

    def __init__(self, config: Any, dataset: Any):
        self.valid_metric = config["valid_metric"].lower()
        if not slices.metrics([1], [self.valid_metric]):
            raise ValueError(
                f"valid_metric: {config['valid_metric']} does not follow from a target's rank; choose Hit, Recall, NDCG or MRR"
            )
        super().__init__(config, dataset)

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """User vectors [B, D] of unit length for histories of internal item ids, old to new."""
        raise NotImplementedError

    def encode_items(self) -> Tensor:
        """Item vectors [I, D] of unit length, computed anew; row 0, the padding item, is zero."""
        raise NotImplementedError

    @property
    def item_matrix(self) -> Tensor:
        """Item vectors [I, D] that users are ranked against, constant until they are set again."""
        if self._item_matrix is None:
            self._item_matrix = self.encode_items()
        return self._item_matrix

    @item_matrix.setter
    def item_matrix(self, matrix: Tensor | None) -> None:
        self._item_matrix = matrix

    def encode_users(self, interaction: Any) -> Tensor:
        """User vectors [B, D] for a RecBole interaction."""
        return self.encode_histories(self._histories_of(interaction))

    # -- scores --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Cosines [B, I] of users with the whole catalogue."""
        return self.encode_users(interaction) @ self.item_matrix.T  # [B, I]

    @torch.no_grad()
    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Cosines [B, C] of users with their candidates [B, C]."""
        users, items = self.encode_users(interaction), self.item_matrix[candidates]  # [B, D], [B, C, D]
        return torch.einsum("bd,bcd->bc", users, items)

    def predict(self, interaction: Any) -> Tensor:
        """RecBole's ``predict``: the score [B] of one item a row."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)  # [B]

    @torch.no_grad()
    def recommend(self, interaction: Any, k: int) -> tuple[Tensor, Tensor]:
        """The k best items of each user, best first: scores and internal ids, both [B, k]; of fewer items, all of them.

        By ``faiss.IndexFlatIP``, exact: no row of I scores is ever made. As in RecBole's ranking for sequential models,
        items of the history are not left out.
        """
        import faiss

        index = faiss.IndexFlatIP(self.item_matrix.size(1))
        index.add(np.ascontiguousarray(self.item_matrix[1:].cpu().numpy()))  # without the padding item
        users = np.ascontiguousarray(self.encode_users(interaction).cpu().numpy())
        scores, items = index.search(users, min(k, index.ntotal))
        return torch.from_numpy(scores), torch.from_numpy(items) + 1

    # -- validation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def valid_score(self) -> float:
        """``valid_metric`` of the validation targets in the whole catalogue, of ``valid_users`` users."""
        users = self._asked_users()
        histories = [self.histories.before(user, "valid").tolist() for user in users]
        targets = torch.tensor([self.histories.target(user, "valid") for user in users], device=self.item_matrix.device)
        scores = self.encode_histories(histories) @ self.item_matrix.T  # [N, I]
        scores[:, 0] = -torch.inf
        own = scores.gather(1, targets[:, None])  # [N, 1]
        if scores.isnan().any():
            return float("nan")
        ranks = (scores > own).sum(1) + 0.5 * ((scores == own).sum(1) - 1) + 1  # [N]
        return slices.metrics(ranks.tolist(), [self.valid_metric])[self.valid_metric]

    def _asked_users(self) -> list[int]:
        """Users whom validation asks, drawn by the run's seed."""
        users = self.histories.evaluated("valid")
        return np.random.default_rng(self.seed).permutation(users)[: self.valid_users].tolist()

    @property
    def answer_fingerprint(self) -> str | None:
        settings = [self.prompt_settings, self.backbone_fingerprint]
        return self.stages_fingerprint and fingerprint([self.stages_fingerprint, self.answering, settings])
