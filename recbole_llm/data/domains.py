"""Domains: catalogues with training histories, and the mixtures of them that an adapter is trained on.

A domain is another RecBole dataset, or a view of the target by its category field where no other dataset is at hand.
Nothing but the training split of any of them is ever read here. Users and items of two domains need not overlap.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np

from recbole_llm.data.items import ItemTexts

logger = getLogger()

LAST_ONLY = 10**9  # a window that gives each user's last training item alone

@dataclass(frozen=True)
class Domain:
    """One catalogue with what its users did in the training split.

    Attributes:
        name: dataset name, or ``<dataset>/<category>`` for a view.
        items: texts by internal item id.
        histories: internal item ids in time order, one array a user, validation and test items left out.
        noun, verb: how prompts call an item and what users do with it ("movie", "watched").
    """

    name: str
    items: ItemTexts
    histories: list[np.ndarray]
    noun: str
    verb: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts and training histories."""
        digest = hashlib.sha256(f"{self.name}|{self.noun}|{self.verb}|{self.items.fingerprint()}".encode())
        for history in self.histories:
            digest.update(len(history).to_bytes(8, "little") + history.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def trained_items(self) -> np.ndarray:
        """Internal ids of the items that occur in the training split, in their order."""
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.histories]))


class Row(NamedTuple):
    """One training example: the item at ``end`` of a user's history, after the items before it."""

    domain: int
    user: int
    end: int


def of_dataset(config: Any, dataset: Any) -> Domain:
    """The domain of a RecBole dataset: its training split, every user but the padding one."""
    histories = dataset.histories
    users = range(1, len(histories.items))
    rows = [histories.train(user) for user in users]
    return Domain(config["dataset"], dataset.item_texts, rows, config["noun"], config["verb"])


def load(names: Sequence[str], config: Any) -> list[Domain]:
    """Other datasets as domains, each with its own property file, under the data path of this run.

    Raises:
        FileNotFoundError: a dataset is not on disk; the message says which files are expected where.
    """
    from recbole_llm.data.dataset import create_dataset

    domains = []
    for name in names:
        logger.info(f"domain {name}: reading")
        other = config.for_dataset(name)
        dataset = create_dataset(other)
        domains.append(of_dataset(other, dataset))
    return domains


def views(domain: Domain, field: str | None, *, at_least: int, at_most: int) -> list[Domain]:
    """Views of a domain, one for each of its most frequent categories: histories reduced to items of that category.

    They stand in for other datasets where none is given. A category counts when at least ``at_least`` users have two
    or more of its items; the ``at_most`` largest are taken.

    Raises:
        ValueError: no category field, one that the ``.item`` file lacks, or no category with enough users.
    """
    if field is None:
        raise ValueError(
            f"general_datasets: none given, and {domain.name} has no category_field to cut views from; "
            f"give --general_datasets=\"['OTHER_DATASET']\" or --category_field=COLUMN of the .item file"
        )
    if field not in domain.items.fields:
        raise ValueError(f"domain_field: {domain.name}.item has no column {field!r}, only {', '.join(domain.items.fields)}")
    categories = [set(text.split()) for text in domain.items.fields[field]]
    counts = Counter(category for entry in categories for category in entry)
    found = []
    for category, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        inside = np.array([category in entry for entry in categories])
        histories = [kept for history in domain.histories if len(kept := history[inside[history]]) >= 2]
        # a category that nearly everything belongs to is the target again, not another domain
        if len(histories) >= at_least and inside[1:].mean() < 0.9:
            found.append(Domain(f"{domain.name}/{category}", domain.items, histories, domain.noun, domain.verb))
        if len(found) == at_most:
            break
    if not found:
        raise ValueError(
            f"domain_field: no category of `{field}` in {domain.name} has {at_least} users with two items; "
            f"give --general_datasets=\"['OTHER_DATASET']\""
        )
    return found


def training_rows(domains: Sequence[Domain], *, window: int | None, samples: int | None, seed: int) -> list[Row]:
    """Training examples of a mixture, shuffled by ``seed``.

    Args:
        window: None gives every prefix of every history (RecBole's samples). A number gives rows for whole-sequence
            training: they end where the history ends and step back by ``window``, so that each item is a target once.
        samples: at most so many rows, drawn without replacement; None takes all.
    """
    rows = []
    for index, domain in enumerate(domains):
        for user, history in enumerate(domain.histories):
            ends = range(len(history) - 1, 0, -(window or 1))
            rows += [Row(index, user, end) for end in ends]
    if not rows:
        raise ValueError(f"{', '.join(domain.name for domain in domains)}: no user has two training interactions")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[: samples or len(rows)]]
