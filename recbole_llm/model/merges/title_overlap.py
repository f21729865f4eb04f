"""The words that the titles of two adapters' training data have in common, for the record of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recbole_llm.data.domains import Domain
    from recbole_llm.evaluation.recommender import Facts
    from recbole_llm.model.adapters import AdapterSpec


def title_overlap(first: Sequence[Domain], second: Sequence[Domain]) -> float | None:
    """The number of words in titles of both, divided by that of either (Jaccard); None without a word.

    Counts the titles of items that occur in the training histories.
    """
    one, other = _words(first), _words(second)
    return len(one & other) / len(one | other) if one | other else None


def _words(domains: Sequence[Domain]) -> set[str]:
    titles = (domain.items.titles[item] for domain in domains for item in domain.trained_items.tolist())
    return {word for title in titles for word in re.findall(r"\w+", title.casefold())}


def with_title_overlap(facts: Facts, specs: Mapping[str, AdapterSpec]) -> Facts:
    """Facts whose merge says for each pair of adapters ``title_words``, the overlap of their titles; None if one is given."""
    if facts.merge is None:
        return facts

    def of(names: Sequence[str]) -> float | None:
        one, other = (specs[name].sources if name not in facts.given_adapters else () for name in names)
        return title_overlap(one, other) if one and other else None

    pairs = [{**pair, "title_words": of(pair["adapters"])} for pair in facts.merge["pairs"]]
    return replace(facts, merge={**facts.merge, "pairs": pairs})
