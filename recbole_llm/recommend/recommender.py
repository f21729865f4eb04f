"""Recommendations of a finished run.

Legend: B users, I items, C candidates, N items that a re-ranker ranks anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_llm.data.items import lacks_titles
from recbole_llm.evaluation.full_ranking import RandomTies, finite, mask
from recbole_llm.evaluation.recommender import ClassicalRecommender, Variant
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.recommend.readers import MOMENTS, Readers
from recbole_llm.recommend.titles import Titles

CELLS = 2**25
"""Scores that are held at once."""
COLUMNS = ("user", "rank", "item", "title", "score")

Somebody = tuple[str, int, list[int]]
"""How a user is called, the internal id (0: not in the dataset) and the history of internal item ids, oldest first."""


def load(
    run: str | Path, *, data_path: str | None = None, llm_path: str | None = None, text_encoder_path: str | None = None
) -> RunRecommender:
    """A finished run as a recommender; executes nothing of what lies in the run's folder.

    Args:
        run: folder of a run, such as ``saved/runs/SASRec-ml-100k-1234abcd``, its record.json, the folder of a shared run, or
            ``hub:user/name``.
        data_path: folder that contains the dataset, if it is not where the run has read it.
        llm_path, text_encoder_path: where the base models are, if they are not where the run has read them.

    Raises:
        ValueError: as :meth:`~recbole_llm.recommend.past_run.PastRun.load`.
    """
    return RunRecommender(PastRun.load(run, data_path, {"llm_path": llm_path, "text_encoder_path": text_encoder_path}))


class RunRecommender:
    """Recommends what the model of a run ranks highest.

    Attributes:
        run: the loaded run.
        titles: finds its items.
    """

    def __init__(self, run: PastRun):
        self.run = run
        parts, data = run.parts, run.dataset
        self._readers = Readers(parts.model, parts.config, {"valid": parts.valid, "test": parts.test})
        user_ids, item_ids = data.tokens
        self._user_ids = {token: user for user, token in enumerate(user_ids) if user}
        self.titles = Titles(item_ids, *_texts(parts.config, data))
        self._ties = RandomTies(user_ids, item_ids)

    @property
    def users(self) -> list[str]:
        """The ids of all users of the dataset."""
        return [*self._user_ids]

    def history(self, user: str, until: str = "now") -> pd.DataFrame:
        """The items of a user, oldest first: columns ``item`` and ``title``; ``until`` as in :meth:`recommend`."""
        items = self._readers.history(self._user(user), _moment(until))
        return pd.DataFrame([[self.titles.item_ids[i], self.titles.names[i]] for i in items], columns=["item", "title"])

    def recommend(
        self,
        histories: Sequence[Sequence[str]] = (),
        *,
        users: Sequence[str] = (),
        k: int = 10,
        candidates: Sequence[str] | None = None,
        until: str = "now",
        seen: bool = False,
        row: str | None = None,
    ) -> pd.DataFrame:
        """The best items for users of the dataset, then for histories.

        Args:
            histories: titles or ids of items, oldest first, of people who need not be in the dataset.
            users: ids of the dataset.
            k: number of items for each.
            candidates: titles or ids of the items that are ranked; None: the catalogue.
            until: where a user's history ends: ``now``, or before the item of ``test`` or ``valid``, as in the evaluation.
            seen: items of the history may be recommended, as they always may where the data has repeats.
            row: another row of the run's results; None: the model.

        Returns:
            Columns ``user`` (``history 1``, ... for histories), ``rank``, ``item``, ``title`` and ``score``, which is comparable
            for one user alone.

        Raises:
            ValueError: an unknown user, item or row, or a model that cannot recommend to a history.
        """
        asked = [(user, *self._known(user, until)) for user in users]
        asked += [
            (f"history {number}", 0, self.titles.find_all(history, f"history {number}"))
            for number, history in enumerate(histories, start=1)
        ]
        batches = self.batches(asked, k=k, candidates=candidates, until=until, seen=seen, row=row)
        parts = [part for _, part in batches]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)

    def somebody(self, user: str, until: str = "now") -> Somebody:
        """A user of the dataset, for :meth:`batches`."""
        return (user, *self._known(user, until))

    @torch.no_grad()
    def batches(
        self,
        asked: Sequence[Somebody],
        *,
        k: int = 10,
        candidates: Sequence[str] | None = None,
        until: str = "now",
        seen: bool = False,
        row: str | None = None,
    ) -> Iterator[tuple[int, pd.DataFrame]]:
        """As :meth:`recommend`, in batches: the number of people in it and their recommendations. Memory is that of one batch."""
        if k < 1:
            raise ValueError(f"--top={k}: give a number of items, 1 or more")
        _moment(until)
        variant = self.run.variant(row)
        listed = None if candidates is None else torch.tensor(self.titles.find_all(candidates, "candidates"))
        if listed is not None and len(listed.unique()) < len(listed):
            raise ValueError("candidates: an item is listed twice")
        width = len(self.titles.names) if listed is None else len(listed)
        size = min(max(1, CELLS // width), 32 if variant.reranked or listed is not None else 1024)
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            for part in ([one for one in batch if one[1]], [one for one in batch if not one[1]]):
                if part:
                    yield len(part), self._of_batch(part, variant, listed, k=k, until=until, seen=seen)

    def _of_batch(
        self, asked: Sequence[Somebody], variant: Variant, listed: Tensor | None, *, k: int, until: str, seen: bool
    ) -> pd.DataFrame:
        users, histories = [user for _, user, _ in asked], [history for _, _, history in asked]
        if not all(histories):
            raise ValueError(f"{asked[histories.index([])][0]}: the history is empty, so nothing is known to recommend from")
        interaction = self._readers.users(users, until) if users[0] else self._readers.unknown(histories)
        left_out = [] if seen or self._readers.histories.repeats_kept else histories
        try:
            if listed is None:
                items, scores = self._of_catalogue(interaction, users, left_out, variant, k)
            else:
                items, scores = self._of_list(interaction, listed.repeat(len(users), 1), left_out, variant, k)
        except KeyError as error:
            if users[0]:
                raise
            raise self._readers.explained(error) from error
        lines = []
        for (name, *_), own, values in zip(asked, items.tolist(), scores.tolist(), strict=True):
            ranked = [pair for pair in zip(own, values, strict=True) if pair[1] > -np.inf]
            lines += [
                [name, rank, self.titles.item_ids[item], self.titles.names[item], score]
                for rank, (item, score) in enumerate(ranked, start=1)
            ]
        return pd.DataFrame(lines, columns=COLUMNS)

    def _of_catalogue(
        self, interaction: Any, users: Sequence[int], left_out: Sequence[Sequence[int]], variant: Variant, k: int
    ) -> tuple[Tensor, Tensor]:
        """Items and scores [B, K], best first, ranked as in a full ranking; minus infinity is no item."""
        scores = mask(self._catalogue_scores(interaction, variant), _places(left_out), partial=variant.partial)  # [B, I]
        number = min(max(k, variant.reranked), scores.size(1))
        ranked = self._ties(scores, torch.tensor(users), number)  # [B, I]
        items = ranked.topk(number, dim=1).indices  # [B, N]
        scores = scores.gather(1, items)
        if not variant.reranked:
            return items[:, :k], scores[:, :k]
        if k > variant.reranked:
            raise ValueError(f"--top={k}: the run re-ranks {variant.reranked} items of its retriever (retriever_top); give fewer")
        missing = scores == -torch.inf  # somebody knows almost all items
        anew = finite(variant.score(interaction, items.where(~missing, items[:, :1])).float()).to(items.device)
        return _best(items, anew.masked_fill(missing, -torch.inf), k)

    def _of_list(
        self, interaction: Any, listed: Tensor, left_out: Sequence[Sequence[int]], variant: Variant, k: int
    ) -> tuple[Tensor, Tensor]:
        """Items and scores [B, K] of given items [B, C]; equal scores stay in their order."""
        listed = listed.to(self.run.parts.config["device"])
        scores = finite(variant.score(interaction, listed).float()).to(listed.device)  # [B, C]
        for row, known in enumerate(left_out):
            scores[row, torch.isin(listed[row], torch.tensor(known, device=listed.device))] = -torch.inf
        return _best(listed, scores, k)

    def _catalogue_scores(self, interaction: Any, variant: Variant) -> Tensor:
        """Scores [B, I]; of a model that scores one item at a time, with the columns of each item."""
        width = len(self.titles.names)
        try:
            return variant.score_catalogue(interaction).view(-1, width)
        except NotImplementedError:
            recommender = self.run.parts.trainer.recommender
            if not isinstance(recommender, ClassicalRecommender):
                raise
        columns = self.run.dataset.get_item_feature().to(self.run.parts.config["device"])
        found = []
        for user in range(len(interaction)):
            rows = interaction[[user] * width]
            rows.update(columns)
            found.append(torch.cat([recommender.model.predict(rows[part]) for part in torch.arange(width).split(2**14)]))
        return torch.stack(found)  # [B, I]

    def _known(self, user: str, until: str) -> tuple[int, list[int]]:
        internal = self._user(user)
        return internal, self._readers.history(internal, _moment(until)).tolist()

    def _user(self, user: str) -> int:
        if user not in self._user_ids:
            raise ValueError(
                f"--user={user}: the dataset has no such user (it has {len(self._user_ids):,}, such as {self.users[0]})"
            )
        return self._user_ids[user]


def _texts(config: Any, data: Any) -> tuple[Sequence[str], ...]:
    """Titles, names and years of the catalogue by internal id; item ids in their place without titles."""
    if lacks_titles(config):
        return data.catalogue_titles, data.catalogue_titles
    texts = data.item_texts
    year = texts.columns.get("year_field")
    return texts.titles, texts.names, texts.fields[year] if year else ()


def _moment(until: str) -> str:
    if until not in MOMENTS:
        raise ValueError(f"--until={until}: give {', '.join(MOMENTS)}")
    return until


def _best(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # [B, K]
    return items.gather(1, order), scores.gather(1, order)


def _places(histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor] | None:
    """Rows and items of histories, for :func:`~recbole_llm.evaluation.full_ranking.mask`."""
    if not histories:
        return None
    rows = torch.arange(len(histories)).repeat_interleave(torch.tensor([len(history) for history in histories]))
    return rows, torch.tensor([item for history in histories for item in history])
