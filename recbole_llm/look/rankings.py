"""What a row of a run ranks for a user, as its evaluation did: the same candidates or catalogue, the same history, the same ties.

Legend: B users, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation.full_ranking import finite
from recbole_llm.evaluation.ranks import target_ranks, target_slots
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.recommend.readers import Readers
from recbole_llm.recommend.recommender import RunRecommender
from recbole_llm.recommend.request import Request
from recbole_llm.store.files import is_complete
from recbole_llm.store.scores import CachedScores

_BATCH = 32  # users


@dataclass(frozen=True)
class Ranking:
    """The best items of a user.

    Attributes:
        items: their ids, best first.
        scores: comparable for one user alone.
        rank: of the target, infinite if it is not ranked; None if it is not among the items and no more is known.
        target_score: None with such a rank.
    """

    items: list[str]
    scores: list[float]
    rank: float | None
    target_score: float | None

    def agrees(self, recorded: float) -> bool:
        """Whether the rank is the one of the record."""
        return recorded > len(self.items) if self.rank is None else recorded == self.rank


def rankings(
    run: PastRun, row: str | None, users: Sequence[str], k: int, advance: Callable[[int], Any] = lambda _: None
) -> dict[str, Ranking]:
    """The best ``k`` items of each user before the test item.

    Args:
        run: loaded as it was evaluated.
        row: a row beside the model; None: the model.
        users: evaluation users of the run.
        advance: called with a number of users that are done.
    """
    found = _of_candidates if run.parts.test.candidates else _of_catalogue
    return dict(found(run, run.variant(row), row, users, k, advance))


@torch.no_grad()
def _of_candidates(
    run: PastRun, variant: Variant, row: str | None, users: Sequence[str], k: int, advance: Callable[[int], Any]
) -> Iterator[tuple[str, Ranking]]:
    parts, histories, candidates = run.parts, run.dataset.histories, run.parts.test.candidates
    internal = {token: user for user, token in enumerate(histories.user_ids) if user}
    readers = Readers(parts.model, parts.config, {"valid": parts.valid, "test": parts.test})
    cached = _cached(parts.config, variant, candidates)
    for start in range(0, len(users), _BATCH):
        tokens = users[start : start + _BATCH]
        own = [internal[user] for user in tokens]
        targets = torch.tensor([histories.target(user, "test") for user in own])  # [B]
        listed = candidates.lookup(torch.tensor(own), targets)  # [B, C]
        scores = cached.find(torch.tensor(own)) if cached else None
        if scores is None:
            device = parts.config["device"]
            scores = variant.score(readers.users(own, "test"), listed.to(device)).float().cpu()  # [B, C]
        scores = scores if variant.partial else finite(scores)
        slots, missed = target_slots(listed, targets, scores)
        ranks, _ = target_ranks(scores, slots, missed)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # [B, K]
        values = zip(
            tokens, listed.gather(1, order), scores.gather(1, order), ranks, scores.gather(1, slots[:, None]), strict=True
        )
        for user, items, best, rank, (score,) in values:
            ranked = best > -torch.inf
            names = [histories.item_ids[item] for item in items[ranked].tolist()]
            lost = rank == torch.inf
            yield user, Ranking(names, best[ranked].tolist(), float(rank), None if lost else float(score))
        advance(len(tokens))


def _cached(config: Any, variant: Variant, candidates: CandidateSet) -> CachedScores | None:
    """The scores that the evaluation of the run has cached, if they are still there; nothing is added to them."""
    folder = variant.scores_folder(config["checkpoint_dir"], candidates.sha256, candidates.users)
    return CachedScores(folder) if folder is not None and is_complete(folder) else None


def _of_catalogue(
    run: PastRun, variant: Variant, row: str | None, users: Sequence[str], k: int, advance: Callable[[int], Any]
) -> Iterator[tuple[str, Ranking]]:
    histories, recommender = run.dataset.histories, RunRecommender(run)
    internal = {token: user for user, token in enumerate(histories.user_ids) if user}
    request = Request(k=min(k, variant.reranked or k), until="test", row=row, seen=run.dataset.known_items is None)
    yield from ((user, Ranking([], [], None, None)) for user in users)  # of which a file of predictions may lack some
    people = [*recommender.people(users, "test")]
    for number, found in recommender.batches(people, request):
        for user, own in found.groupby("user", sort=False):
            items, scores = own["item"].tolist(), own["score"].tolist()
            target = histories.item_ids[histories.target(internal[user], "test")]
            place = items.index(target) if target in items else None
            rank, score = (None, None) if place is None else (place + 1.0, scores[place])
            yield user, Ranking(items, scores, rank, score)
        advance(number)
