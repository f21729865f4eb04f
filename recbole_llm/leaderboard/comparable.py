"""Whether the runs of a table may be compared: the same split, masking of histories, candidates and users.

Each check raises a ValueError that names the runs, says how they differ, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from recbole_llm.data import passport as passports
from recbole_llm.leaderboard.table import DONE, Cell

_Run = tuple[Cell, Mapping[str, Any]]  # with its record

_MASKING = {
    True: "masked the users' histories (mask_history: true)",
    False: "did not mask the users' histories (mask_history: false)",
    None: "ranked drawn candidates",
}


def check(protocol: str, cells: Sequence[Cell]) -> None:
    """Refuse runs of one protocol that were not measured alike; cells without a result are ignored."""
    runs = [(cell, cell.record) for cell in cells if cell.status == DONE and cell.record is not None]
    by_seed: dict[int | None, list[_Run]] = {}
    for cell, record in runs:
        if not record.get("passport") or "mask_history" not in (record.get("protocol") or {}):
            raise ValueError(
                f"leaderboard: {protocol}: the record of {_names([(cell, record)])} is from an earlier state of this package and "
                f"does not say how it was measured (passport, mask_history); run it again: {cell.command}"
            )
        by_seed.setdefault(record["passport"]["filters"].get("seed"), []).append((cell, record))
    for own in by_seed.values():  # one group, unless the split depends on the seed
        _alike(protocol, own, lambda record: passports.identity(record["passport"]), _other_split)
    _alike(protocol, runs, _masking, _other_masking)
    _alike(protocol, runs, lambda record: record["protocol"].get("targets"), _other_targets)
    _alike(protocol, [(cell, record) for cell, record in runs if candidates(record)], candidates, _other_candidates)


def same_users(what: str, users: Mapping[str, Sequence[str]]) -> int | None:
    """The number of users, which must be the same for every name; None without names."""
    if not users:
        return None
    (name, one), *others = users.items()
    for other_name, other in others:
        if other != one:
            odd = sorted(set(one) ^ set(other))
            raise ValueError(
                f"leaderboard: {what}: {name} ({len(one)} users) and {other_name} ({len(other)} users) have different users "
                f"({odd[0]!r} is in one only); run them on the same data, or under another protocol"
            )
    return len(one)


def candidates(record: Mapping[str, Any] | None) -> str | None:
    """The SHA-256 of the test candidates; None after a full ranking."""
    digests = (record or {}).get("candidates_sha256")
    digest = digests.get("test") if isinstance(digests, Mapping) else None
    return digest if isinstance(digest, str) else None


def _alike(protocol: str, runs: Sequence[_Run], key: Callable[[Mapping[str, Any]], Hashable], says: Callable[..., str]) -> None:
    """Refuse runs whose records have different keys; ``says`` tells how some of them differ from the most common ones."""
    groups: dict[Hashable, list[_Run]] = {}
    for cell, record in runs:
        groups.setdefault(key(record), []).append((cell, record))
    if len(groups) > 1:
        most, odd, *_ = sorted(groups.values(), key=lambda group: -len(group))
        raise ValueError(f"leaderboard: {protocol}: {says(_names(odd), odd[0][1], _names(most), most[0][1])}")


def _other_split(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    how = "; ".join(passports.differences(one["passport"], other["passport"]))
    remedy = "run them on the same data with the same filters, or under another protocol"
    return f"the split of {odd} is not that of {most}: {how}; {remedy}"


def _masking(record: Mapping[str, Any]) -> bool | None:
    return record["protocol"]["mask_history"]


def _other_masking(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    drawn = None in (_masking(one), _masking(other))
    remedy = "give all models the same mode in eval_args" if drawn else "set mask_history to one value for all models"
    first, second = (_MASKING[_masking(record)] for record in (one, other))
    return f"{odd} {first}, but {most} {second}; {remedy}, or run them under another protocol"


def _other_targets(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    first, second = (record["protocol"].get("targets") for record in (one, other))
    return (
        f"users have several test items, which {odd} ranked {first}, and {most} ranked {second} (RecBole ranks them one "
        "by one for sequential models, together for all others); such results cannot be compared: give eval_args one target for "
        "each user, {'split': {'LS': 'valid_and_test'}}, or run them under another protocol"
    )


def _other_candidates(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    return (
        f"{odd} ranked the candidates {candidates(one)}, but {most} ranked {candidates(other)}; such results cannot be compared: "
        "run them on the same candidates, or under another protocol"
    )


def _names(runs: Sequence[_Run], most: int = 3) -> str:
    names = [f"{cell.label} (seed {cell.seed})" for cell, _ in runs]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
