"""The passport of a split: counts and hashes that identify it, independent of the model.

Two kinds of hashes (SHA-256) describe the same split:

*Exact* hashes are computed from the tokens of the files: ``interactions`` (for each user the line ``user item item ...``, in the
order of time and ties), ``valid`` and ``test`` (for each target the line ``user item``).

*Invariant* hashes do not change with other ids, another order of rows or another form of the file. An item is written as its
popularity, the number of its interactions in the filtered data: ``popularities`` (a line for each item), ``histories`` (a line
for each user), ``targets`` (a line for each target). Shuffling a file changes the order of one user's items with equal times, so
these are sorted by popularity. For the same reason, a target that is chosen by time is written as its history and the place of
its group of equal times. Which item of the group is the target depends on the order of ties; so do the sketches.

The lines of a hash are sorted and end in line feeds; tabs separate their parts. Items of equal popularity are indistinguishable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from recbole_llm.data import forms, scenarios
from recbole_llm.data.sketches import common, sketch
from recbole_llm.data.split_facts import PHASES

FILTERS = (
    *("benchmark_filename", "rm_dup_inter", "tie_order", "val_interval", "filter_inter_by_user_or_item"),
    *("user_inter_num_interval", "item_inter_num_interval", *scenarios.SETTINGS),
)
"""The keys that shape a split, beside ``eval_args`` and the seeds."""

_ROUNDED = 8  # items before a target that the rounded sketch reads


@dataclass(frozen=True, eq=False)
class Interactions:
    """R interactions after the filters and before the split, sorted by user, then by time.

    Attributes:
        users, items: internal ids [R].
        tied: BoolArray[R], whether user and time are those of the row before; all rows of a user without times.
        user_ids, item_ids: tokens by internal id.
    """

    users: np.ndarray
    items: np.ndarray
    tied: np.ndarray
    user_ids: Sequence[str]
    item_ids: Sequence[str]

    @cached_property
    def bounds(self) -> np.ndarray:
        """The rows of user u are ``bounds[u]`` to ``bounds[u + 1]``: IntArray[U + 1]."""
        return np.searchsorted(self.users, np.arange(len(self.user_ids) + 1))

    @cached_property
    def groups(self) -> np.ndarray:
        """The first row of each row's group of equal times: IntArray[R]."""
        return np.maximum.accumulate(np.where(self.tied, 0, np.arange(len(self.users))))

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of interactions of each row's item: IntArray[R]."""
        return np.bincount(self.items, minlength=len(self.item_ids))[self.items]

    @cached_property
    def invariant(self) -> np.ndarray:
        """:attr:`counts`, sorted within groups of equal times: IntArray[R]."""
        return self.counts[np.lexsort((self.counts, self.groups))]

    @cached_property
    def digests(self) -> list[str]:
        """A hash of each user's line of :attr:`invariant`."""
        return [sha256(line.encode()).hexdigest() for line in self.lines(self.invariant)]

    def lines(self, values: np.ndarray) -> list[str]:
        """One line per user, of the values [R] of its rows."""
        texts, bounds = values.tolist(), self.bounds.tolist()
        return ["\t".join(map(str, texts[low:high])) for low, high in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True, eq=False)
class Targets:
    """The T targets of a phase.

    Attributes:
        rows: of :class:`Interactions`, IntArray[T].
        by_time: whether the target is chosen by its time.
    """

    rows: np.ndarray
    by_time: bool


def held_out(config: Any, dataset: Any, whole: Interactions, splits: Mapping[str, Any]) -> dict[str, Targets]:
    """The targets of each phase: those of the evaluation users in leave-one-out by time, else all rows of the splits.

    Args:
        dataset: with the histories of the run.
        splits: RecBole's datasets of the phases ``valid`` and ``test``, if there are any.
    """
    by_time = forms.needs_time(config)
    if forms.leaves_one_out(config):
        back = {"valid": 2, "test": 1}
        users = {phase: dataset.histories.evaluated(phase) for phase in PHASES}
        return {phase: Targets(whole.bounds[users[phase] + 1] - back[phase], by_time) for phase in PHASES}
    keys = whole.users * len(whole.item_ids) + whole.items  # [R]
    order = np.argsort(keys, kind="stable")
    found = {}
    for phase in PHASES:
        if phase not in splits:
            found[phase] = Targets(np.empty(0, dtype=np.int64), by_time)
            continue
        split = splits[phase]
        users, items = (split.inter_feat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))  # [T], [T]
        # of a repeated interaction, the last one
        places = np.searchsorted(keys[order], users * len(whole.item_ids) + items, side="right") - 1
        found[phase] = Targets(order[places], by_time)
    return found


def passport(config: Any, read: tuple[int, int, int], whole: Interactions, targets: Mapping[str, Targets]) -> dict[str, Any]:
    """The passport of a split, as JSON values.

    Args:
        read: users, items and interactions before the filters.
        targets: of the phases ``valid`` and ``test``.
    """
    users, items, rows = (len(np.unique(whole.users)), len(np.unique(whole.items)), len(whole.users))
    names = ("users", "items", "interactions")
    return {
        "dataset": config["dataset"],
        "read": dict(zip(names, read, strict=True)),
        "counts": {
            **dict(zip(names, (users, items, rows), strict=True)),
            "density": rows / max(users * items, 1),
            "targets": {phase: len(own.rows) for phase, own in targets.items()},
        },
        "filters": _filters(config),
        "sha256": _hashes(whole, targets),
        "sketches": _sketches(whole, targets["test"]),
    }


def identity(passport: Mapping[str, Any]) -> tuple[str, ...]:
    """The hashes that are equal for equal splits, ids included."""
    return tuple(passport["sha256"][name] for name in ("interactions", *PHASES))


def differing(one: Mapping[str, Any], other: Mapping[str, Any], kind: str) -> float:
    """The share of the test targets of ``one`` that ``other`` does not have, estimated from their sketches of a kind."""
    sizes = [passport["counts"]["targets"]["test"] for passport in (one, other)]
    shared = common(one["sketches"][kind], other["sketches"][kind], *sizes)
    return min(max(1 - shared / max(sizes[0], 1), 0.0), 1.0)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How the split of ``one`` differs from that of ``other``, in counts, keys and targets."""
    parts = counted(one, other)
    for key in {**one["filters"], **other["filters"]}:
        first, second = one["filters"].get(key), other["filters"].get(key)
        parts += [f"{key} {first} against {second}"] if first != second else []
    if one["sha256"]["test"] != other["sha256"]["test"]:
        sketched = "sketches" in one and "sketches" in other  # a shared run has none
        parts.append(f"{percent(differing(one, other, 'tokens')) + ' of ' if sketched else ''}the test targets differ")
    elif one["sha256"]["valid"] != other["sha256"]["valid"]:
        parts.append("the validation targets differ, the test targets do not")
    elif not parts:
        parts.append("the targets are the same, the interactions before them differ")
    return parts


def counted(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The counts in which two passports differ."""
    pairs = [(name, one["counts"][name], other["counts"][name]) for name in ("users", "items", "interactions")]
    pairs += [(f"{phase} targets", *(passport["counts"]["targets"][phase] for passport in (one, other))) for phase in PHASES]
    return [f"{first:,} {name} against {second:,}" for name, first, second in pairs if first != second]


def percent(share: float) -> str:
    """An estimated share, as ``about 25 %``."""
    return "less than 1 %" if share < 0.005 else f"about {share:.0%}".replace("%", " %")


def _filters(config: Any) -> dict[str, Any]:
    """The keys that shape the split and their values, except those without one."""
    arguments = config["eval_args"]
    found = {key: arguments[key] for key in ("split", "group_by", "order")} | {key: config[key] for key in FILTERS}
    if scenarios.active(config) is None:
        found = {key: value for key, value in found.items() if key not in scenarios.SETTINGS}
    else:
        found["candidates.seed"] = config["candidates"]["seed"]
    if arguments["order"] == "RO":
        found["seed"] = config["seed"]  # the split depends on it
    return {key: value for key, value in found.items() if value is not None}


def _hashes(whole: Interactions, targets: Mapping[str, Targets]) -> dict[str, str]:
    items = np.array(whole.item_ids, dtype=object)[whole.items]  # [R], tokens
    users = zip(whole.user_ids, whole.lines(items), strict=True)
    found = {"interactions": _hash(f"{user}\t{line}" for user, line in users if line)}
    found |= {phase: _hash(_by_token(whole, own)) for phase, own in targets.items()}
    found["popularities"] = _hash(map(str, np.unique(whole.items, return_counts=True)[1].tolist()))
    found["histories"] = _hash(filter(None, whole.lines(whole.invariant)))
    found["targets"] = _hash(f"{phase} {line}" for phase, own in targets.items() for line in _invariant(whole, own))
    return found


def _hash(lines: Iterable[str]) -> str:
    digest = sha256()
    for line in sorted(lines):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _sketches(whole: Interactions, targets: Targets) -> dict[str, str]:
    """Sketches of the targets of a split, from exact to rough.

    ``tokens`` compares splits with the same ids, ``popularity`` splits of the same interactions with other ids. Where some
    interactions differ, so do the popularities of their items in all histories; ``rounded`` still gives an estimate.
    """
    return {
        "tokens": sketch(_by_token(whole, targets)),
        "popularity": sketch(_invariant(whole, targets, which=True)),
        "rounded": sketch(_rounded(whole, targets)),
    }


def _by_token(whole: Interactions, targets: Targets) -> Iterator[str]:
    for user, item in zip(whole.users[targets.rows].tolist(), whole.items[targets.rows].tolist(), strict=True):
        yield f"{whole.user_ids[user]}\t{whole.item_ids[item]}"


def _invariant(whole: Interactions, targets: Targets, *, which: bool = False) -> Iterator[str]:
    """A line for each target: hash of its user's history, place and size of its group of equal times.

    The popularity of the target is added if time does not say what the target is, or with ``which``.
    """
    users, starts = whole.users[targets.rows], whole.groups[targets.rows]  # [T], [T]
    sizes = np.bincount(whole.groups, minlength=len(whole.users))[starts]  # [T]
    columns = users, starts - whole.bounds[users], sizes, whole.counts[targets.rows]
    for user, place, size, count in zip(*(column.tolist() for column in columns), strict=True):
        yield f"{whole.digests[user]} {place} {size}" + (f" {count}" if which or not targets.by_time else "")


def _rounded(whole: Interactions, targets: Targets) -> Iterator[str]:
    """A line for each target: length of the history, popularities of the target and of the items before it, as powers of two."""
    users = whole.users[targets.rows]  # [T]
    ends = whole.bounds[users + 1]  # [T]
    stops = whole.groups[targets.rows] if targets.by_time else ends  # [T]
    columns = whole.bounds[users], stops, ends, whole.counts[targets.rows]
    logarithms = [count.bit_length() for count in whole.invariant.tolist()]
    for low, stop, end, count in zip(*(column.tolist() for column in columns), strict=True):
        yield f"{end - low} {count.bit_length()} {logarithms[max(low, stop - _ROUNDED) : stop]}"
