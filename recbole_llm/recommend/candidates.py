"""The items that a user of the package gives to be ranked: of the catalogue, or new ones, which have nothing but a title.

Legend: C items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.recommend.past_run import PastRun
from recbole_llm.recommend.ranking import Score
from recbole_llm.recommend.titles import Titles

logger = getLogger()

_SHOWN = 5  # new titles that are named in the log


@dataclass(frozen=True)
class GivenItems:
    """Items to rank.

    Attributes:
        items: internal ids [C]; those of new items follow those of the catalogue.
        new: the titles of the new items.
        score: scores any of these items.
    """

    items: Tensor
    new: Sequence[str]
    score: Score

    @classmethod
    def of(cls, texts: Sequence[str], run: PastRun, titles: Titles, row: str | None) -> GivenItems:
        """The items of titles or ids. A title that no item has, or has been given as ``new:TITLE``, is a new item.

        Raises:
            ValueError: an item is given twice, an id is unknown, or the model cannot score new items.
        """
        items: list[int] = []
        new: list[str] = []
        for text in texts:
            title = text.removeprefix("new:").strip()
            try:
                item = None if text.startswith("new:") else titles.known(text)
            except ValueError as error:
                raise ValueError(f"candidates: {error}") from error
            if item is None:
                item = len(titles.names) + len(new)
                new.append(title.removeprefix("title:").strip())
            items.append(item)
        named = [*titles.names, *new]
        seen: dict[int | str, str] = {}
        for text, item in zip(texts, items, strict=True):
            key = item if item < len(titles.names) else named[item]
            if key in seen:
                raise ValueError(f"candidates: an item is listed twice, as {seen[key]!r} and {text!r} ({named[item]})")
            seen[key] = text
        variant = run.variant(row)
        if not new:
            return cls(torch.tensor(items), new, variant.score)
        from recbole_llm.recommend.new_items import scored_with  # imports all LLM models

        close = [f"{title!r} (nearest title: {', '.join(titles.nearest(title, 1)) or 'none'})" for title in new[:_SHOWN]]
        near = "; ".join(close) + (", ..." if len(new) > _SHOWN else "")
        try:
            score = scored_with(new, run, row or next(iter(run.variants)))
        except ValueError as error:
            raise ValueError(f"candidates: no item has the title or the id {near}. {error}") from error
        logger.warning(f"candidates: {len(new)} are not in the catalogue and are ranked by their titles alone: {near}")
        return cls(torch.tensor(items), new, score)
