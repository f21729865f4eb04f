"""Recommendations of a finished run.

Legend: B users, I items, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_llm.data.histories import drawn_users
from recbole_llm.data.items import lacks_titles
from recbole_llm.data.prompts import LongListError
from recbole_llm.evaluation.products import Products
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.recommend.candidates import GivenItems
from recbole_llm.recommend.index import EXACT, SAMPLE, ItemIndex
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.recommend.ranking import CELLS, Ranking
from recbole_llm.recommend.readers import Readers, check_moment
from recbole_llm.recommend.request import Person, Request
from recbole_llm.recommend.titles import Titles

USERS, RERANKED_USERS = 1024, 32
"""Users in a batch, and those whom an LLM ranks for."""
COLUMNS = ("user", "rank", "item", "title", "score")


def load(
    run: str | Path,
    *,
    data_path: str | None = None,
    model: str | None = None,
    llm_path: str | None = None,
    text_encoder_path: str | None = None,
    retriever: bool = True,
) -> RunRecommender:
    """A finished run as a recommender; executes nothing of what lies in the run's folder.

    Args:
        run: folder of a run, such as ``saved/runs/SASRec-ml-100k-1234abcd``, its record.json, the folder of a shared run, or
            ``hub:user/name``.
        data_path: folder that contains the dataset, if it is not where the run has read it.
        model: ``package.module:Class``, if the run is of a model of yours.
        llm_path, text_encoder_path: where the base models are, if they are not where the run has read them.
        retriever: False if only given candidates are ranked; then an LLM ranker that was evaluated on candidates trains no
            retriever.

    Raises:
        ValueError: as :meth:`~recbole_llm.recommend.past_run.PastRun.load`.
    """
    moved = {"llm_path": llm_path, "text_encoder_path": text_encoder_path}
    return RunRecommender(PastRun.load(run, data_path, model, moved=moved, retriever=retriever))


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
        self._ranking = Ranking(run)
        self._indexes: dict[tuple[str | None, str], ItemIndex | None] = {}

    @property
    def users(self) -> list[str]:
        """The ids of all users of the dataset."""
        return [*self._user_ids]

    def history(self, user: str, until: str = "now") -> pd.DataFrame:
        """The items of a user, oldest first: columns ``item`` and ``title``; ``until`` as in :meth:`recommend`."""
        check_moment(until)
        items = self._readers.history(self._user(user), until)
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
        index: str = EXACT,
    ) -> pd.DataFrame:
        """The best items for users of the dataset, then for histories.

        Args:
            histories: titles or ids of items, oldest first, of people who need not be in the dataset.
            users: ids of the dataset.
            k: number of items for each.
            candidates: titles or ids of the items that are ranked; None: the catalogue. A title that no item has is a new
                item, if the model can score it.
            until: where a user's history ends: ``now``, or before the item of ``test`` or ``valid``, as in the evaluation.
            seen: items of the history may be recommended, as they always may where the data has repeats.
            row: another row of the run's results; None: the model.
            index: how the best items are found, as in :meth:`index`.

        Returns:
            Columns ``user`` (``history 1``, ... for histories), ``rank``, ``item`` ("" for a new one), ``title`` and ``score``,
            which is comparable for one user alone.

        Raises:
            ValueError: an unknown user, item or row, or a model that cannot recommend to a history.
        """
        request = Request(k, candidates, until, seen, row, index)
        people = [*self.people(users, until)]
        for number, history in enumerate(histories, start=1):
            name = f"history {number}"
            people.append(Person(name, 0, self.titles.find_all(history, name)))
        parts = [part for _, part in self.batches(people, request)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)

    def people(self, users: Sequence[str], until: str = "now") -> Iterator[Person]:
        """Users of the dataset, for :meth:`batches`; unknown ones are refused at once, histories are read one by one."""
        check_moment(until)
        internal = [self._user(user) for user in users]
        pairs = zip(users, internal, strict=True)
        return (Person(name, user, self._readers.history(user, until).tolist()) for name, user in pairs)

    def index(self, kind: str = EXACT, row: str | None = None) -> ItemIndex | None:
        """The index that finds the best items of a model which scores by products; made once.

        Args:
            kind: ``exact``, or a string of ``faiss.index_factory``.
            row: another row of the run's results; None: the model.

        Returns:
            None for ``exact`` if the model scores in another way, so that each item has to be scored.

        Raises:
            ValueError: such a model with another kind, or a kind that faiss does not make of this catalogue.
        """
        if (row, kind) not in self._indexes:
            self._indexes[row, kind] = self._new_index(kind, row)
        return self._indexes[row, kind]

    def _new_index(self, kind: str, row: str | None) -> ItemIndex | None:
        variant, histories = self.run.variant(row), self._readers.histories
        measured = histories.evaluated("test")
        if len(measured) < 2:  # one user does not show whether scores are products
            measured = np.flatnonzero([len(items) > 0 for items in histories.items])
        users = drawn_users(measured, self.run.parts.config["seed"], SAMPLE).tolist()
        if len(users) > 1:
            few = self._readers.users(users[:5], "now")
            if products := Products.of(variant.score_catalogue, few, len(self.titles.names)):
                return ItemIndex(products, kind, self._readers.users(users, "now"))
        if kind == EXACT:
            return None
        raise ValueError(
            f"--index={kind}: an index is for models whose scores are products of a user's and an item's vector, which those of "
            f"{row or self.run.record['model']} are not; leave it out"
        )

    @torch.no_grad()
    def batches(self, people: Iterable[Person], request: Request) -> Iterator[tuple[int, pd.DataFrame]]:
        """As :meth:`recommend`, in batches: the number of people in it and their recommendations. Memory is that of one batch."""
        variant = self.run.variant(request.row)
        if request.candidates is None and not self.run.ranks_catalogue:
            raise ValueError("the run was loaded with retriever=False, for given items alone; give candidates, or leave that out")
        given = None if request.candidates is None else GivenItems.of(request.candidates, self.run, self.titles, request.row)
        index = self.index(request.index, request.row) if given is None else None
        size = RERANKED_USERS if given or variant.reranked else USERS
        if given is None and index is None:
            size = min(size, max(1, CELLS // len(self.titles.names)))
        waiting = iter(people)
        while batch := [*islice(waiting, size)]:
            known, unknown = ([one for one in batch if bool(one.user) is inside] for inside in (True, False))
            for part in filter(None, (known, unknown)):
                yield len(part), self._of_batch(part, request, variant, given, index)

    def _of_batch(
        self, people: Sequence[Person], request: Request, variant: Variant, given: GivenItems | None, index: ItemIndex | None
    ) -> pd.DataFrame:
        """The recommendations of B people, all of them in the dataset or none."""
        users, histories = [one.user for one in people], [one.history for one in people]
        if not all(histories):
            raise ValueError(f"{people[histories.index([])].name}: the history is empty, so nothing is known to recommend from")
        interaction = self._readers.users(users, request.until) if users[0] else self._readers.unknown(histories)
        unmasked = request.until != "now" and (self.run.record.get("protocol") or {}).get("mask_history") is False  # as evaluated
        left_out = [] if request.seen or unmasked or self._readers.histories.repeats_kept else histories
        try:
            if given is None:
                items, scores = self._ranking.of_catalogue(interaction, users, left_out, variant, request.k, index)
            else:
                listed = given.items.repeat(len(users), 1)  # [B, C]
                items, scores = self._ranking.of_list(interaction, listed, left_out, given.score, request.k)
        except KeyError as error:
            if users[0]:
                raise
            raise self._readers.explained(error) from error
        except LongListError as error:  # its remedy is for a training
            remedy = "give the items to rank as candidates, fewer ones" if given is None else "give fewer of them"
            raise ValueError(f"candidates: the run's prompt cannot list so many ({error.fault}); {remedy}") from error
        ids, names = self.titles.item_ids, self.titles.names
        if given is not None and given.new:
            ids, names = [*ids, *("" for _ in given.new)], [*names, *given.new]
        lines = []
        for one, own, values in zip(people, items.tolist(), scores.tolist(), strict=True):
            ranked = [pair for pair in zip(own, values, strict=True) if pair[1] > -np.inf]
            lines += [[one.name, rank, ids[item], names[item], score] for rank, (item, score) in enumerate(ranked, start=1)]
        return pd.DataFrame(lines, columns=COLUMNS)

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
