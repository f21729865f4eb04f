"""The content of the page: users, their histories, targets and the lists of each column, as JSON values of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.data.histories import drawn_users
from recbole_llm.data.items import lacks_titles, text_fields
from recbole_llm.look.columns import Column
from recbole_llm.look.rankings import Ranking, rankings
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.store.progress import progress_bar

logger = getLogger()

SEED = 2020  # of the users that are drawn
HISTORY = 50  # last items of a history on the page
_CHARACTERS = 300  # of a text


@dataclass
class _Items:
    """The items that the page shows, numbered in the order in which it names them.

    Args:
        ids: tokens by internal id.
        texts: name, attributes and description of an item by internal id.
    """

    ids: Sequence[str]
    texts: Callable[[int], tuple[str, str, str]]
    _numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._internal = {token: item for item, token in enumerate(self.ids) if item}

    def number(self, token: str) -> int:
        return self._numbers.setdefault(token, len(self._numbers))

    def listed(self) -> list[list[str]]:
        """Id, name, attributes and description of each item that has a number."""
        return [[_cut(text) for text in (token, *self.texts(self._internal[token]))] for token in self._numbers]


def chosen_users(columns: Sequence[Column], users: int | Sequence[str]) -> list[str]:
    """The users of the page: so many of the evaluation users, drawn with a fixed seed, or those that are named.

    Raises:
        ValueError: a number below 1, or a user whom the runs have not evaluated.
    """
    known = sorted(columns[0].ranks, key=lambda user: (len(user), user))
    if isinstance(users, int):
        if users < 1:
            raise ValueError(f"--users={users}: give a number of users, 1 or more, or a file of user ids")
        drawn = drawn_users(np.arange(len(known)), SEED, users)
        return [known[place] for place in sorted(drawn.tolist())]
    for user in users:
        if user not in columns[0].ranks:
            raise ValueError(f"--users: the runs have no test user {user!r} (of {len(known):,} users, such as {known[0]!r})")
    return list(dict.fromkeys(users))


def page_content(
    columns: Sequence[Column], users: int | Sequence[str] = 200, *, top: int = 10, data_path: str | None = None
) -> dict[str, Any]:
    """Load the runs one after the other and let each rank for the users of the page.

    Args:
        columns: of runs that were measured alike.
        users: a number or ids, as :func:`chosen_users`.
        top: length of the lists.
        data_path: folder that contains the dataset, if it has moved.

    Returns:
        ``dataset``, what was ranked, and ``columns`` with the number of users whose list disagrees with the record; ``items``:
        id, title, attributes and description; ``users``: id, history (the last items, the latest first, by their place in
        ``items``) and its length, target, its number of training interactions, whether it is cold, and what each column ranked:
        the rank of the target, items, scores, and the score of the target.

    Raises:
        ValueError: as :meth:`~recbole_llm.recommend.past_run.PastRun.load` and :func:`chosen_users`.
    """
    if top < 1:
        raise ValueError(f"--top={top}: give a number of items, 1 or more")
    chosen = chosen_users(columns, users)
    found, facts, items, lines = _computed(columns, chosen, top, data_path)
    for line, user in zip(lines, chosen, strict=True):
        line["ranked"] = [_ranked(column.ranks[user], found[column.name][user], items) for column in columns]
    odd = {column.name: _disagreements(column, found[column.name]) for column in columns}
    return {
        "dataset": str(columns[0].record["dataset"]),
        "evaluated": len(columns[0].ranks),
        "drawn": isinstance(users, int),
        **facts,
        "top": top,
        "columns": [{"name": name, "odd": number} for name, number in odd.items()],
        "items": items.listed(),
        "users": lines,
    }


def _computed(
    columns: Sequence[Column], users: Sequence[str], top: int, data_path: str | None
) -> tuple[dict[str, dict[str, Ranking]], dict[str, Any], _Items, list[dict[str, Any]]]:
    """Rankings by column and user; then :func:`_facts`, the items and :func:`_user` of each user, which the first run has."""
    found: dict[str, dict[str, Ranking]] = {}
    cold = frozenset((columns[0].record.get("slice_users") or {}).get("cold") or ())
    facts: dict[str, Any] = {}
    with progress_bar("look", len(users) * len(columns)) as bar:
        for path in dict.fromkeys(column.path for column in columns):
            run = PastRun.load(path, data_path, as_evaluated=True)
            for column in (one for one in columns if one.path == path):
                row = None if column.is_model else column.row
                found[column.name] = rankings(run, row, users, top, bar.advance)
            if not facts:
                facts, items = _facts(run), _Items(run.dataset.histories.item_ids, _texts(run))
                lines = [{**_user(run, user, items), "cold": user in cold} for user in users]
            del run  # the next one needs its memory
    return found, facts, items, lines


def _disagreements(column: Column, found: Mapping[str, Ranking]) -> int:
    """The number of users whose list, computed now, disagrees with the record; the log warns of them."""
    number = sum(not ranking.agrees(column.ranks[user]) for user, ranking in found.items())
    if number:
        logger.warning(
            f"{column.name}: for {number} of {len(found)} users, the list computed now disagrees with the record's rank"
        )
    return number


def _facts(run: PastRun) -> dict[str, Any]:
    """How many items a model ranks, the SHA-256 of the candidates (None: the catalogue), and whether the history is left out."""
    candidates, data = run.parts.test.candidates, run.dataset
    return {
        "width": candidates.items.size(1) if candidates else len(data.histories.item_ids) - 1,
        "candidates": candidates.sha256 if candidates else None,
        "masked": data.known_items is not None,
    }


def _user(run: PastRun, user: str, items: _Items) -> dict[str, Any]:
    histories = run.dataset.histories
    internal = histories.user_ids.index(user)
    before, target = histories.before(internal, "test"), histories.target(internal, "test")
    return {
        "id": _cut(user),
        "history": [items.number(histories.item_ids[item]) for item in before[::-1][:HISTORY].tolist()],
        "length": len(before),
        "target": items.number(histories.item_ids[target]),
        "trained": int(histories.train_counts[target]),
    }


def _ranked(rank: float, ranking: Ranking, items: _Items) -> list[Any]:
    """Recorded rank (None: not ranked), items and their scores, and the score of the target (None: unknown)."""
    numbers = [items.number(token) for token in ranking.items]
    scores = [*ranking.scores, ranking.target_score]
    return [int(rank) if math.isfinite(rank) else None, numbers, list(map(_rounded, scores[:-1])), _rounded(scores[-1])]


def _rounded(score: float | None) -> float | None:
    return float(f"{score:.3g}") if score is not None and math.isfinite(score) else None


def _texts(run: PastRun) -> Callable[[int], tuple[str, str, str]]:
    """Title, attributes and description of an item by internal id; the id is an attribute of items that share their title."""
    config, data = run.parts.config, run.dataset
    if lacks_titles(config):
        return lambda item: (data.catalogue_titles[item], "", "")
    texts = data.item_texts
    description = texts.columns.get("description_field")
    named = [column for column in text_fields(config, texts) if column != description]
    known, described = texts.known(named), texts.fields.get(description, ())

    def of_item(item: int) -> tuple[str, str, str]:
        title, own = texts.titles[item], [*known[item].values()]
        own += [f"item {data.tokens[1][item]}"] if texts.names[item] != title else []
        return title, " · ".join(own), described[item] if described else ""

    return of_item


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
