"""Domains: catalogues with training histories, and the mixtures of them that an LM or an adapter is trained on.

A domain is another RecBole dataset, or a view of the target dataset by category if no other dataset is given. Only training
splits are trained on. The log reports users and items that two domains share.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from logging import getLogger
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recbole_llm.data.items import ItemTexts, title_key
from recbole_llm.data.repeats import repeats_kept
from recbole_llm.data.split_facts import split_lines

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

logger = getLogger()


@dataclass(frozen=True)
class Domain:
    """One catalogue with the training histories of its users.

    Attributes:
        name: dataset name, or ``<dataset>/<category>`` for a view.
        items: texts by internal item id.
        histories: internal item ids in time order, one array per user, without validation and test items.
        noun, verb, verb_base: the words of prompts for an item and for an interaction ("movie", "watched", "watch").
        repeats_kept: the dataset has repeats, see :func:`recbole_llm.data.repeats.repeats_kept`.
    """

    name: str
    items: ItemTexts
    histories: list[np.ndarray]
    noun: str
    verb: str
    verb_base: str = "choose"
    repeats_kept: bool = False

    def excluded(self, history: Iterable[int], target: int) -> set[int]:
        """Items that may not be negatives of a target: the user's whole training history; with repeats kept, only the target.

        Otherwise a list could be answered by "the item of the history".
        """
        return {int(target)} if self.repeats_kept else {int(target), *map(int, history)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts and training histories."""
        digest = hashlib.sha256("|".join([self.name, *self.words.values(), self.items.fingerprint()]).encode())
        for history in self.histories:
            digest.update(len(history).to_bytes(8, "little") + history.astype("<i8").tobytes())
        digest.update(b"repeats" * self.repeats_kept)
        return digest.hexdigest()

    @property
    def words(self) -> dict[str, str]:
        """The words of prompts by slot."""
        return {"noun": self.noun, "verb": self.verb, "verb_base": self.verb_base}

    @cached_property
    def trained_items(self) -> np.ndarray:
        """Sorted internal ids [n] of the items that occur in the training split."""
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.histories]))


POSITIONS = ("all", "last", "last_and_others")  # which prefixes of the training histories are examples


class TrainingExample(NamedTuple):
    """The item at ``end`` of a user's history, after the items before it.

    Attributes:
        domain: index into the mixture.
        user: index into that domain's histories.
        end: position in that history.
    """

    domain: int
    user: int
    end: int


def of_dataset(config: Any, dataset: Any) -> Domain:
    """The domain of a RecBole dataset: the training split of every user but the padding one."""
    rows = [dataset.histories.train(user) for user in range(1, len(dataset.histories.items))]
    words = config["noun"], config["verb"], config["verb_base"]
    return Domain(config["dataset"], dataset.item_texts, rows, *words, repeats_kept(dataset))


def load(names: Sequence[str], config: Any, target: tuple[Domain, Histories]) -> list[Domain]:
    """Other datasets as domains, each with its property file, under the data path of this run.

    Args:
        target: the dataset of this run; the log says what the others share with it.

    Raises:
        FileNotFoundError: a dataset is not on disk; the message says which files are expected where.
    """
    domains = []
    for name in names:
        logger.info(f"domain {name}: reading")
        other = config.for_dataset(name)
        dataset = other.read_dataset()
        for line in split_lines(other, dataset):
            logger.info(f"domain {line}")
        domains.append(_without_new(*target, of_dataset(other, dataset)))
        _report_overlap(*target, domains[-1], dataset.histories)
    return domains


def _without_new(target: Domain, histories: Histories, other: Domain) -> Domain:
    """``other`` without the interactions with items that the scenario of the run keeps new, which are known by their titles."""
    new = {title_key(target.items.titles[item]) for item in histories.scenario.new}
    known = np.array([title_key(title) in new for title in other.items.titles])
    kept = [history[~known[history]] for history in other.histories]
    if left_out := sum(map(len, other.histories)) - sum(map(len, kept)):
        logger.warning(
            f"domain {other.name}: {left_out} training interactions are left out, with items whose titles are those of new items "
            f"of {target.name}"
        )
    return replace(other, histories=kept) if left_out else other


def _report_overlap(target: Domain, histories: Histories, other: Domain, theirs: Histories) -> None:
    """Log which user ids and titles another domain shares with the target."""
    ours, known = set(map(title_key, target.items.titles[1:])), [title_key(title) for title in other.items.titles]
    users = set(histories.user_ids[1:]).intersection(theirs.user_ids[1:])
    logger.info(
        f"domain {other.name}: {len(other.histories)} users, {len(known) - 1} items, {sum(map(len, other.histories))} training "
        f"interactions; in common with {target.name}: {len(ours.intersection(known[1:]))} titles, {len(users)} user ids"
    )
    ids, leaked = {token: user for user, token in enumerate(theirs.user_ids)}, 0
    for user in histories.evaluated("test").tolist():
        if (token := histories.user_ids[user]) in users:
            held_out = title_key(target.items.titles[histories.target(user, "test")])
            leaked += held_out in {known[item] for item in theirs.train(ids[token]).tolist()}
    if leaked:
        logger.warning(
            f"domain {other.name}: its training data contains the test item of {leaked} users of {target.name}, by user id and "
            "title; if these ids are the same people, leave this domain out"
        )


def named_or_views(key: str, config: Any, target: tuple[Domain, Histories]) -> list[Domain]:
    """The datasets that ``config[key]`` names, or :func:`views` of the target if it names none.

    Raises:
        ValueError: a name is given twice or is that of the target; or as :func:`views`.
        FileNotFoundError: as :func:`load`.
    """
    for name, times in Counter([target[0].name, *config[key]]).items():
        if times > 1:
            raise ValueError(f"{key}: {name} occurs {times} times, --dataset included; name each domain once")
    if config[key]:
        return load(config[key], config, target)
    field, least, most = (
        config["domain_field"] or target[0].items.columns.get("category_field"),
        config["domain_min_users"],
        config["domain_max_views"],
    )
    found = views(target[0], field, at_least=least, at_most=most, key=key)
    names = ", ".join(view.name.split("/")[-1] for view in found)
    logger.info(f"{key}: none given; using {len(found)} views of {target[0].name} by category: {names}")
    return found


def views(domain: Domain, field: str | None, *, at_least: int, at_most: int, key: str) -> list[Domain]:
    """Views of a domain, one for each of its most frequent categories: histories reduced to items of that category.

    Uses the ``at_most`` largest categories of which at least ``at_least`` users have two or more items.

    Args:
        key: the key that names no other datasets, for error messages.

    Raises:
        ValueError: no category field, one that the ``.item`` file lacks, or no category with enough users.
    """
    others = "" if key == "domain_field" else f"--{key}=\"['OTHER_DATASET']\" or "
    if field is None:
        raise ValueError(
            f"{key}: none given, and {domain.name} has no category_field for views; give {others}--category_field=COLUMN of "
            f"the .item file, whose columns besides the title are: {', '.join(domain.items.fields) or 'none'}"
        )
    if field not in domain.items.fields:
        raise ValueError(f"domain_field: {domain.name}.item has no column {field!r}, only {', '.join(domain.items.fields)}")
    categories = [set(values) for values in domain.items.values(field)]
    counts = Counter(category for entry in categories for category in entry)
    found, most = [], 0
    for category, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        inside = np.array([category in entry for entry in categories])
        histories = [rest for history in domain.histories if len(rest := history[inside[history]]) >= 2]
        if inside[1:].mean() >= 0.9:  # a category of nearly all items equals the target
            continue
        most = max(most, len(histories))
        if len(histories) >= at_least:
            found.append(replace(domain, name=f"{domain.name}/{category}", histories=histories))
        if len(found) == at_most:
            break
    if not found:
        raise ValueError(
            f"domain_field: no category of `{field}` in {domain.name} has {at_least} users with two items, the largest has "
            f"{most}; give {others}a lower --domain_min_users, or another --domain_field"
        )
    return found


def united(domains: Sequence[Domain]) -> tuple[list[str], list[np.ndarray]]:
    """Names by item and training histories of several domains, whose items are numbered consecutively."""
    names: list[str] = []
    histories: list[np.ndarray] = []
    for domain in domains:
        histories += [history + len(names) for history in domain.histories]
        names += domain.items.names
    return names, histories


def training_examples(
    domains: Sequence[Domain],
    *,
    window: int | None = None,
    samples: int | None,
    seed: int,
    of_each: bool = False,
    positions: str = "all",
    most: int | None = None,
) -> list[TrainingExample]:
    """Training examples of a mixture, shuffled by ``seed``.

    Args:
        window: None gives every prefix of every history (RecBole's samples). A number gives examples for whole-sequence
            training: their ends step back from the end of the history by ``window``, so that each item is a target once.
        samples: at most this many examples, drawn without replacement; None takes all.
        of_each: draw ``samples`` from each domain; the draw of a domain is the same in every mixture.
        positions: one of :data:`POSITIONS`; all but ``all`` exclude ``window``. ``last`` gives one example per history, whose
            target is its last item. ``last_and_others`` gives these and ``samples`` of the other prefixes.
        most: at most this many examples of each domain, drawn from those.

    Raises:
        ValueError: no history has two items; or ``window`` is given with other positions than ``all``.
    """
    if positions != "all" and window is not None:
        raise ValueError(f"window: {window} has no meaning with positions={positions!r}")
    certain: list[TrainingExample] = []
    others: list[TrainingExample] = []
    for index, domain in enumerate(domains):
        own, rest = _by_position(index, domain, positions, window)
        rest = _drawn(rest, samples, seed) if of_each else rest
        if most is not None:
            own, rest = [], _drawn([*own, *rest], most, seed)
        certain += own
        others += rest
    if not certain and not others:
        raise ValueError(f"{', '.join(domain.name for domain in domains)}: no user has two training interactions")
    drawn = _drawn(others, None if of_each else samples, seed)
    return _drawn([*certain, *drawn], None, seed) if certain else drawn


def _by_position(
    index: int, domain: Domain, positions: str, window: int | None
) -> tuple[list[TrainingExample], list[TrainingExample]]:
    """The examples of a domain that are taken in any case, and those to draw from."""
    last: list[TrainingExample] = []
    others: list[TrainingExample] = []
    for user, history in enumerate(domain.histories):
        ends = [TrainingExample(index, user, end) for end in range(len(history) - 1, 0, -(window or 1))]
        last += ends[:1]
        others += ends if positions == "all" else ends[1:]
    return {"all": ([], others), "last": ([], last), "last_and_others": (last, others)}[positions]


def _drawn(examples: list[TrainingExample], samples: int | None, seed: int) -> list[TrainingExample]:
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[: samples or len(examples)]]
