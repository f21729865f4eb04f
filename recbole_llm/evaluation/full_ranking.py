"""A full ranking, the same for every model: scores of the catalogue, the history masked, ties broken, the top re-ranked.

Legend: B users, I items, N re-ranked items, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.scenarios import draw_lots

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories
    from recbole_llm.data.masking import KnownItems
    from recbole_llm.evaluation.recommender import Variant

_CELLS = 2**22  # scores that are sorted at once
_PRIME = 2**31 - 1  # products of two smaller numbers fit into 64 bits


def finite(scores: Tensor) -> Tensor:
    """A copy of scores with the largest and smallest number in place of infinite ones, so that each item is ranked; NaN stays."""
    limits = torch.finfo(scores.dtype)
    return scores.clamp(min=limits.min, max=limits.max)


def mask(scores: Tensor, history: tuple[Tensor, Tensor] | None, *, partial: bool = False) -> Tensor:
    """Scores [B, I] in fp32 with minus infinity for the padding item and for ``history``, rows and items [H], alone.

    Args:
        partial: an item at minus infinity is not ranked and stays there; otherwise it is last.

    Raises:
        ValueError: a score is not a number.
    """
    scores = scores.float()
    if scores.isnan().any():
        raise ValueError("the model returned NaN as the score of some items, which cannot be ranked")
    scores = scores.clamp(min=-torch.inf) if partial else finite(scores)  # a copy
    scores[:, 0] = -torch.inf
    if history is not None:
        scores[history] = -torch.inf
    return scores


class RandomTies:
    """Breaks ties in a random order of the items, which differs by user and is the same for every model.

    ``torch.topk`` orders equal scores arbitrarily, and internal ids have the order of the files, so either could favour or harm a
    target. Here, a target is at a uniformly random place among the items that have its score, as it is among candidates.

    Args:
        user_ids, item_ids: tokens by internal id; the order depends on them alone.
    """

    def __init__(self, user_ids: Sequence[str], item_ids: Sequence[str]):
        self._user_ids, self._item_ids = user_ids, item_ids

    @cached_property
    def _hashes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers below a prime: x of items [I], a and b of users [U]; a user's order is that of a x + b modulo the prime."""
        parts = ((self._item_ids, "ties: item"), (self._user_ids, "ties: slope"), (self._user_ids, "ties: shift"))
        items, slopes, shifts = (
            torch.from_numpy((draw_lots(ids, 0, purpose) * _PRIME).astype(np.int64)) for ids, purpose in parts
        )
        return items, slopes.clamp(min=1), shifts

    def __call__(self, scores: Tensor, users: Tensor, k: int, targets: Tensor | None = None) -> Tensor:
        """Scores [B, I] without ties among the best ``k`` items or with ``targets`` [B]: such a row has minus its ranks."""
        tied = self._tied(scores, k, targets).nonzero().flatten()  # [R]
        if not len(tied):
            return scores
        found = scores.clone()
        for part in tied.split(max(1, _CELLS // scores.size(1))):
            found[part] = self._ranks(scores[part], users.cpu()[part.cpu()])
        return found

    def order(self, items: Tensor, users: Tensor) -> Tensor:
        """The places [B, N] of items [B, N] in the random order of their users [B]."""
        hashes, slopes, shifts = self._hashes
        users = users.cpu()
        return ((slopes[users, None] * hashes[items.cpu()] + shifts[users, None]) % _PRIME).argsort(dim=1).to(items.device)

    def _ranks(self, scores: Tensor, users: Tensor) -> Tensor:
        """Minus the rank of each item [R, I]; masked items stay so."""
        everything = torch.arange(scores.size(1), device=scores.device).expand_as(scores)
        order = self.order(everything, users)  # [R, I]
        best = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))  # [R, I]
        places = torch.arange(scores.size(1), device=scores.device, dtype=scores.dtype).expand_as(scores)
        ranks = torch.empty_like(scores).scatter_(1, best, places)
        return (-ranks).where(scores > -torch.inf, -torch.inf)

    @staticmethod
    def _tied(scores: Tensor, k: int, targets: Tensor | None) -> Tensor:
        best = scores.topk(min(k + 1, scores.size(1)), dim=1).values  # [B, k + 1]
        tied = ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)).any(1)  # [B]
        if targets is not None:
            tied |= (scores == scores.gather(1, targets[:, None])).sum(1) > 1
        return tied


def rerank(
    scores: Tensor, interaction: Any, users: Tensor, score: Callable[[Any, Tensor], Tensor], top: int, ties: RandomTies
) -> tuple[Tensor, Tensor]:
    """Scores [B, I] with the ``top`` items in the order of another score; an item at minus infinity stays there.

    The highest scores are reassigned in that order, so each re-ranked item scores above all other items. The model sees the items
    in a random order, as candidates, so that neither their places in a prompt nor its ties tell the retriever's ranks.

    Args:
        users: internal ids [B].
        score: (interaction, candidates [B, N]) -> scores [B, N].
        ties: a random order of the items for each user.

    Returns:
        The scores, of which equal ones are items that the model ranks equally, and those without ties; both [B, I].

    Raises:
        ValueError: a score is not a number.
    """
    best, items = scores.topk(min(top, scores.size(1)), dim=1)  # [B, N]
    order = ties.order(items, users)  # [B, N]
    items, masked = items.gather(1, order), best.gather(1, order) == -torch.inf  # of a user who knows almost all items
    others = score(interaction, items.where(~masked, scores.argmax(1, keepdim=True))).to(items.device)  # [B, N]
    if others.isnan().any():
        raise ValueError("the model returned NaN as the score of some of the re-ranked items, which cannot be ranked")
    others, order = finite(others).masked_fill(masked, -torch.inf).sort(dim=1, descending=True, stable=True)  # [B, N]
    places = torch.arange(best.size(1), device=best.device).expand_as(best)
    firsts = places.where(others != others.roll(1, dims=1), 0).cummax(1).values  # the first place of an item's score
    items = items.gather(1, order)
    return scores.scatter(1, items, best.gather(1, firsts)), scores.scatter(1, items, best)


@dataclass(frozen=True)
class FullRanking:
    """The full ranking of an evaluation split.

    Attributes:
        known: the history of its users; None if it is not masked.
        ties: breaks ties.
        k: length of the longest list that metrics read.
    """

    known: KnownItems | None
    ties: RandomTies
    k: int

    def __call__(
        self, scores: Tensor, interaction: Any, users: Tensor, positives: tuple[Tensor, Tensor] | None, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """A batch's scores with the history masked and the top re-ranked, and those to rank by, without ties; both [B, I].

        Args:
            scores: of the catalogue [B, I].
            interaction: RecBole's, of the ``users`` [B].
            positives: rows and items [T] of the targets; None: those of a user are not known, nor what to mask.
        """
        history = targets = None
        if positives is not None:
            rows, items = positives
            history = self.known.of(users, rows, items) if self.known is not None else None
            targets = items.to(scores.device) if len(rows) == len(users) else None
        masked = mask(scores, history, partial=variant.partial)
        ranked = self.ties(masked, users, max(self.k, variant.reranked), targets)
        if not variant.reranked:
            return masked, ranked
        return rerank(ranked, interaction, users, variant.score, variant.reranked, self.ties)


def ranked_catalogue(variant: Variant, interaction: Any, user_field: str, histories: Histories) -> Tensor:
    """Scores [B, I] of the catalogue, history included, in the order of a variant that re-ranks."""
    ranking = FullRanking(None, RandomTies(histories.user_ids, histories.item_ids), 1)
    return ranking(variant.score_catalogue(interaction), interaction, interaction[user_field], None, variant)[1]
