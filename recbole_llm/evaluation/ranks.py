"""Scores -> RecBole's metrics, and the rank of every user.

To RecBole, the candidate protocol is full ranking: one row per user, a score for each item of the catalogue, minus infinity
outside the candidates. So all of RecBole's metrics apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.data.histories import drawn_users

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet


def target_ranks(scores: Tensor, slots: Tensor, missed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rank [B] of the target among its candidates, and how many others tie with it [B].

    Rank 1 is best. Equal scores rank in the order of slots, which candidate files shuffle, so a constant scorer is at chance.

    Args:
        scores: [B, C], finite or infinite.
        slots: the slot of the target, [B].
        missed: rows [B] without the target, whose rank is then infinite: it is in no top k, also where k exceeds C.
    """
    target = scores.gather(1, slots[:, None])  # [B, 1]
    place = torch.arange(scores.size(1), device=scores.device)[None, :]  # [1, C]
    equal = scores == target  # [B, C]
    better = (scores > target) | (equal & (place < slots[:, None]))  # [B, C]
    ranks, ties = better.sum(1) + 1, equal.sum(1) - 1  # [B]
    if missed is None:
        return ranks, ties
    return ranks.double().masked_fill(missed, math.inf), ties.masked_fill(missed, 0)


@dataclass
class Ranks:
    """Rank of the target among the candidates for each evaluation user, in order of evaluation.

    Attributes:
        users: internal user ids.
        ranks: see :func:`target_ranks`; infinite for a missed target.
        ties: number of other candidates with exactly the target's score.
        missed: number of targets that are not ranked.
        slots: the slot of the target, and ``first`` that of the first place, both before others break the ties.
    """

    users: list[int] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)
    missed: int = 0
    slots: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)

    def add(
        self, users: Tensor, scores: Tensor, slots: Tensor, missed: Tensor | None = None, untied: Tensor | None = None
    ) -> None:
        """Add a batch: users [B], the arguments of :func:`target_ranks` and, if others break the ties, the scores to rank by."""
        ranks, ties = target_ranks(scores, slots, missed)
        if untied is not None:
            ranks, _ = target_ranks(untied, slots, missed)
        self.users += users.tolist()
        self.ranks += ranks.tolist()
        self.ties += ties.tolist()
        self.slots += slots.tolist()
        self.first += scores.argmax(1).tolist()
        self.missed += 0 if missed is None else int(missed.sum())

    @property
    def tie_rate(self) -> float:
        """Share of users whose target ties with another candidate."""
        return sum(tie > 0 for tie in self.ties) / max(len(self.ties), 1)


def gather_scores(model: Any, interaction: Any, candidates: Tensor, item_field: str) -> Tensor:
    """Scores [B, C] of candidates [B, C] by a RecBole model, from its full ranking or, if it has none, item by item."""
    try:
        full = model.full_sort_predict(interaction)
    except NotImplementedError:
        rows = interaction.repeat_interleave(candidates.size(1))  # B * C
        rows.interaction[item_field] = candidates.flatten()
        return model.predict(rows).view_as(candidates)  # [B, C]
    return full.view(len(candidates), -1).gather(1, candidates)  # [B, I] -> [B, C]


def scatter_to_catalogue(scores: Tensor, candidates: Tensor, item_count: int, *, partial: bool = False) -> Tensor:
    """Candidate scores [B, C] as catalogue scores [B, item_count] without ties.

    Scores become minus their rank, so equal scores have the order of the candidate file, not one that ``torch.topk`` chooses. If
    they are ``partial``, minus infinity stays: such a candidate is not ranked.

    Raises:
        ValueError: a score is not a number.
    """
    if torch.isnan(scores).any():
        raise ValueError("the model returned NaN as the score of some candidates, which cannot be ranked")
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # [B, C]
    places = torch.empty_like(order).scatter_(1, order, torch.arange(scores.size(1), device=scores.device).expand_as(order))
    row = torch.full((scores.size(0), item_count), -torch.inf, device=scores.device)  # [B, I]
    ranks = (-places).float()
    return row.scatter_(1, candidates, ranks.masked_fill(scores == -torch.inf, -torch.inf) if partial else ranks)


def exclude_missed(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Which targets, ``items`` [T] in ``rows`` [T] of scores [B, I], are at minus infinity: not ranked [T].

    ``torch.topk`` fills a short ranking up with any item. In rows with such a target, the other items become finite, in place,
    so that it does not choose the target.
    """
    rows, items = rows.to(scores.device), items.to(scores.device)
    missed = scores[rows, items] == -torch.inf
    if missed.any():
        short = rows[missed].unique()
        scores[short] = scores[short].clamp(min=torch.finfo(scores.dtype).min)
        scores[short, 0] = -torch.inf
        scores[rows[missed], items[missed]] = -torch.inf
    return missed


def early_stopping_users(valid_data: Any, seed: int, number: int) -> Tensor:
    """The users whom early stopping measures: ``number`` of those with candidates, of those of ``eval_users``, or of all."""
    listed, ranked = (getattr(valid_data, name, None) for name in ("candidates", "users"))
    ranked = listed.users if listed else ranked
    users = valid_data._dataset.histories.evaluated("valid") if ranked is None else ranked.numpy()
    return torch.from_numpy(drawn_users(users, seed, number))


def of_users(batch: tuple[Any, Any, Tensor, Tensor], field: str, users: Tensor | None) -> tuple[Any, None, Tensor, Tensor]:
    """The rows of ``users`` [N], or all, of a batch of RecBole's full ranking: interaction, None, rows and items of targets.

    RecBole's history of a batch is dropped, since it has none for sequential models.
    """
    interaction, _, rows, items = batch
    if users is None:
        return interaction, None, rows, items
    kept = torch.isin(interaction[field], users.to(interaction[field].device))  # [B]
    place = kept.cumsum(0) - 1  # [B]
    own = kept[rows]  # [T]
    return interaction[kept], None, place[rows[own]], items[own]


def covered(candidates: CandidateSet, interaction: Any, targets: Tensor, user_field: str) -> tuple[Any, Tensor, Tensor]:
    """The rows, users and targets of a batch for which there are candidates."""
    users = interaction[user_field]
    found = candidates.covers(users)
    if found.all():
        return interaction, users, targets
    # some users have too few interactions for a split that is equal for all models
    return interaction[found], users[found], targets[found]
