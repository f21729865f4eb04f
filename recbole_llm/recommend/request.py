"""For whom something is recommended, and what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from recbole_llm.recommend.index import EXACT
from recbole_llm.recommend.readers import check_moment


class Person(NamedTuple):
    """A user of the dataset, or somebody with a history.

    Attributes:
        name: as tables show it.
        user: internal id; 0 for somebody who is not in the dataset.
        history: internal item ids, oldest first.
    """

    name: str
    user: int
    history: Sequence[int]


@dataclass(frozen=True)
class Request:
    """What is recommended, and how; the attributes are the arguments of that name of
    :meth:`~recbole_llm.recommend.recommender.RunRecommender.recommend`.

    Raises:
        ValueError: k is below 1, ``until`` is unknown, or an index is to find given items.
    """

    k: int = 10
    candidates: Sequence[str] | None = None
    until: str = "now"
    seen: bool = False
    row: str | None = None
    index: str = EXACT

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--top={self.k}: give a number of items, 1 or more")
        if self.candidates is not None and self.index != EXACT:
            raise ValueError(f"--index={self.index}: given items are scored one by one; leave it out, or --candidates")
        check_moment(self.until)
