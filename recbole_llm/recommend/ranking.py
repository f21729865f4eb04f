"""The best items of users, in the order of an evaluation: of the catalogue or of given items.

Legend: B users, I items, C candidates, N best items of the catalogue, which a re-ranker ranks anew, K items that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.evaluation.full_ranking import RandomTies, finite, mask
from recbole_llm.evaluation.recommender import ClassicalRecommender, Variant
from recbole_llm.recommend.index import ItemIndex
from recbole_llm.recommend.past_run import PastRun

CELLS = 2**25
"""Scores of the catalogue that are held at once."""
_ROUNDING = 1e-6
"""Scores whose difference is smaller, relative to the best one, could change their order by rounding."""

Histories = Sequence[Sequence[int]]
Score = Callable[[Any, Tensor], Tensor]
"""(interaction, items [B, C]) -> scores [B, C]."""


class Ranking:
    """Ranks items by the scores of a run's model."""

    def __init__(self, run: PastRun):
        self._run = run
        user_ids, item_ids = run.dataset.tokens
        self._width = len(item_ids)
        self._ties = RandomTies(user_ids, item_ids)

    def of_catalogue(
        self, interaction: Any, users: Sequence[int], left_out: Histories, variant: Variant, k: int, index: ItemIndex | None
    ) -> tuple[Tensor, Tensor]:
        """Items and scores [B, K], best first, ranked as in a full ranking; minus infinity is no item.

        Args:
            users: internal ids [B], by which ties are broken; 0 for somebody who is not in the dataset.
            left_out: items of each user that are not recommended; empty for none.
            index: finds the best items; None scores the catalogue.

        Raises:
            ValueError: k is more than a re-ranker ranks anew.
        """
        if variant.reranked and k > variant.reranked:
            raise ValueError(f"--top={k}: the run re-ranks {variant.reranked} items of its retriever (retriever_top); give fewer")
        number = min(max(k, variant.reranked), self._width)
        if index is None:
            items, scores = self._in_full(interaction, users, left_out, variant, number)
        else:
            items, scores = self._searched(interaction, users, left_out, variant, number, index)
        if not variant.reranked:
            return items, scores
        order, first = self._ties.order(items, torch.tensor(users)), items[:, :1]  # as in the evaluation
        items, missing = items.gather(1, order), scores.gather(1, order) == -torch.inf  # somebody knows almost all items
        anew = finite(variant.score(interaction, items.where(~missing, first)).float()).to(items.device)
        return _best(items, anew.masked_fill(missing, -torch.inf), k)

    def of_list(self, interaction: Any, listed: Tensor, left_out: Histories, score: Score, k: int) -> tuple[Tensor, Tensor]:
        """Items and scores [B, K] of given items [B, C]; equal scores stay in their order."""
        listed = listed.to(self._run.parts.config["device"])
        scores = finite(score(interaction, listed).float()).to(listed.device)  # [B, C]
        return _best(listed, _without(listed, scores, left_out), k)

    def _searched(
        self, interaction: Any, users: Sequence[int], left_out: Histories, variant: Variant, number: int, index: ItemIndex
    ) -> tuple[Tensor, Tensor]:
        """The N best items by an index; if it is exact, those of users whose order depends on rounding from all scores."""
        longest = max(map(len, left_out), default=0)
        items, scores = index.search(interaction, number + longest + 1)  # [B, M]
        items, scores = _best(items, _without(items, scores, left_out), number + 1)  # [B, N + 1]
        if index.is_exact:
            gaps = scores[:, :-1] - scores[:, 1:]  # NaN between items that there are not
            unsure = (gaps <= _ROUNDING * scores[:, :1].abs()).any(1).nonzero().flatten()
            for part in unsure.split(max(1, CELLS // self._width)) if len(unsure) else ():
                rows = part.tolist()
                own = [left_out[row] for row in rows] if left_out else []
                found = self._in_full(interaction[rows], [users[row] for row in rows], own, variant, number)
                width = min(items.size(1), found[0].size(1))
                for known, anew in zip((items, scores), found, strict=True):
                    known[part, :width] = anew[:, :width].to(known)
        return items[:, :number], scores[:, :number]

    def _in_full(
        self, interaction: Any, users: Sequence[int], left_out: Histories, variant: Variant, number: int
    ) -> tuple[Tensor, Tensor]:
        """The N best items by the scores of all items."""
        scores = mask(self._catalogue_scores(interaction, variant), _places(left_out), partial=variant.partial)  # [B, I]
        ranked = self._ties(scores, torch.tensor(users), number)  # [B, I]
        items = ranked.topk(number, dim=1).indices  # [B, N]
        return items, scores.gather(1, items)

    def _catalogue_scores(self, interaction: Any, variant: Variant) -> Tensor:
        """Scores [B, I]; of a model that scores one item at a time, with the columns of each item."""
        try:
            return variant.score_catalogue(interaction).view(-1, self._width)
        except NotImplementedError:
            recommender = self._run.parts.trainer.recommender
            if not isinstance(recommender, ClassicalRecommender):
                raise
        columns = self._run.dataset.get_item_feature().to(self._run.parts.config["device"])
        found = []
        for user in range(len(interaction)):
            rows = interaction[[user] * self._width]
            rows.update(columns)
            found.append(torch.cat([recommender.model.predict(rows[part]) for part in torch.arange(self._width).split(2**14)]))
        return torch.stack(found)  # [B, I]


def _best(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # [B, K]
    return items.gather(1, order), scores.gather(1, order)


def _without(items: Tensor, scores: Tensor, left_out: Histories) -> Tensor:
    """Scores of items, both [B, C], with minus infinity for those that are left out; in place."""
    for row, known in enumerate(left_out):
        scores[row, torch.isin(items[row], torch.tensor(known, device=items.device))] = -torch.inf
    return scores


def _places(histories: Histories) -> tuple[Tensor, Tensor] | None:
    """Rows and items of histories, for :func:`~recbole_llm.evaluation.full_ranking.mask`."""
    if not histories:
        return None
    rows = torch.arange(len(histories)).repeat_interleave(torch.tensor([len(history) for history in histories]))
    return rows, torch.tensor([item for history in histories for item in history])
