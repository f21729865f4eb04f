"""Scores -> RecBole's metrics, and the rank of every user.

To RecBole, the candidate protocol is the full ranking of a catalogue that holds the candidates alone: one row per user, a column
for each slot. RecBole's metrics of accuracy read where the target ranks in a row, not which item a column is, so they all apply.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.data.histories import drawn_users

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet


def target_slots(candidates: Tensor, targets: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The slot [B] of each target [B] among its candidates [B, C], and which are missed [B]: not there, or at minus infinity.

    The slot of a missed target means nothing.
    """
    found = candidates == targets[:, None]  # [B, C]
    if scores is not None:
        found &= scores > -torch.inf
    return found.int().argmax(1), ~found.any(1)


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
        slots: the slot of the target.
        first: the slot of the first place.
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
        self.first += (scores if untied is None else untied).argmax(1).tolist()
        self.missed += 0 if missed is None else int(missed.sum())

    @property
    def tie_rate(self) -> float:
        """Share of users whose target ties with another candidate."""
        return sum(tie > 0 for tie in self.ties) / max(len(self.ties), 1)


SCORES = 2**24
"""Scores of a user and an item that are held at once, in a few copies, at most: 64 MiB of 32-bit numbers."""

_PAIRS = 2**18  # users and items that a model without full ranking scores at once
_BY_ITEM = frozenset({"Pop"})  # whose scores of single items are exactly those of the full ranking, at no other cost per item


def gather_scores(model: Any, interaction: Any, candidates: Tensor, item_field: str) -> Tensor:
    """Scores [B, C] of candidates [B, C] by a RecBole model with I items.

    They are the model's full ranking at the candidates, of so many users at once that it has :data:`SCORES` scores; or scores
    item by item, if the model has no full ranking, or if that gives the same numbers.
    """

    def part(interaction: Any, candidates: Tensor) -> Tensor:
        full = model.full_sort_predict(interaction)
        return full.view(len(candidates), -1).gather(1, candidates)  # [b, I] -> [b, C]

    def by_item(interaction: Any, candidates: Tensor) -> Tensor:
        rows = interaction.repeat_interleave(candidates.size(1))  # b * C
        rows.interaction[item_field] = candidates.flatten()
        return model.predict(rows).view_as(candidates)  # [b, C]

    if type(model).__name__ not in _BY_ITEM:
        with contextlib.suppress(NotImplementedError):
            return in_parts(part, interaction, candidates, SCORES // model.n_items)
    return in_parts(by_item, interaction, candidates, _PAIRS // candidates.size(1))


def in_parts(score: Callable[[Any, Tensor], Tensor], interaction: Any, candidates: Tensor, number: int) -> Tensor:
    """Scores [B, C] of candidates [B, C] by ``score``, of ``number`` users at once."""
    number = max(1, number)
    if len(candidates) <= number:
        return score(interaction, candidates)
    starts = range(0, len(candidates), number)
    return torch.cat([score(interaction[start : start + number], candidates[start : start + number]) for start in starts])


def candidate_rows(
    scores: Tensor, candidates: Tensor, targets: Tensor, longest: int, *, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of candidates [B, C] as RecBole's rows [B, W], the column of each target [B], and which targets are missed [B].

    Scores become minus their rank, so equal scores have the order of the candidate file, not one that ``torch.topk`` chooses. If
    they are ``partial``, minus infinity stays: such a candidate is not ranked. Columns from C on hold no candidate. They are at
    minus infinity, but where the target is missed all other columns are above it, so that it is in no list of ``longest`` items.

    Args:
        scores, candidates: [B, C].
        targets: [B], each at most once among the candidates.
        longest: of the lists that metrics read; W is at least two more.

    Raises:
        ValueError: a score is not a number.
    """
    if torch.isnan(scores).any():
        raise ValueError("the model returned NaN as the score of some candidates, which cannot be ranked")
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # [B, C]
    places = torch.empty_like(order).scatter_(1, order, torch.arange(scores.size(1), device=scores.device).expand_as(order))
    ranks = (-places).float()  # [B, C]
    if partial:
        ranks = ranks.masked_fill(scores == -torch.inf, -torch.inf)
    rows = pad(ranks, (0, max(longest - scores.size(1), 0) + 2), value=-torch.inf)  # [B, W]
    columns, missed = target_slots(candidates, targets, ranks)  # [B], [B]
    if missed.any():
        lowest = torch.finfo(rows.dtype).min
        short = rows[missed].clamp(min=lowest / 2)
        short[:, -2], short[:, -1] = lowest, -torch.inf  # the target is below all that are ranked
        rows[missed], columns[missed] = short, rows.size(1) - 2
    return rows, columns, missed


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
    """The users [N] whom early stopping measures: ``number`` of those with candidates, of those of ``eval_users``, or of all."""
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
    """The rows of a batch of B targets for which there are candidates: interaction, users [b] and targets [b]."""
    users = interaction[user_field]
    found = candidates.covers(users)
    if found.all():
        return interaction, users, targets
    # some users have too few interactions for a split that is equal for all models
    return interaction[found], users[found], targets[found]
