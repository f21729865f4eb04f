"""Whether the runs of a table may be compared: the same split, masking of histories, candidates and users.

Each check raises a ValueError that names the runs, says how they differ, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from recbole_llm.data import passport as passports
from recbole_llm.leaderboard.table import DONE, Cell

_Run = tuple[Cell, Mapping[str, Any]]  # with its record

_MASKING = {
    True: "masked the users' histories (mask_history: true)",
    False: "did not mask the users' histories (mask_history: false)",
    None: "ranked drawn candidates",
}


APART = "run them under another protocol"


def check(what: str, cells: Sequence[Cell], apart: str = APART) -> None:
    """Refuse runs that were not measured alike; cells without a result are ignored.

    Args:
        what: compares them, such as ``leaderboard: candidates``; the error begins with it.
        apart: what to do with runs that stay different.
    """
    runs = [(cell, cell.record) for cell in cells if cell.status == DONE and cell.record is not None]
    alike = partial(_alike, what, apart)
    by_seed: dict[int | None, list[_Run]] = {}
    for cell, record in runs:
        by_seed.setdefault(record["passport"]["filters"].get("seed"), []).append((cell, record))
    for own in by_seed.values():  # one group, unless the split depends on the seed
        alike(own, lambda record: passports.identity(record["passport"]), _other_split)
        alike(own, _users, _other_users)
        for name in dict.fromkeys(name for _, record in own for name in sizes(record)):
            having = [(cell, record) for cell, record in own if name in sizes(record)]
            alike(having, partial(_size, name=name), partial(_other_slice, name))
    alike(runs, _masking, _other_masking)
    alike(runs, lambda record: record["protocol"].get("targets"), _other_targets)
    for own in _by_candidates(runs).values():
        alike(own, _ranked, _other_candidates)


def _by_candidates(runs: Sequence[_Run]) -> dict[Hashable, list[_Run]]:
    """The runs that rank the same items: all of them, or those of a seed if the split or all candidates depend on it."""
    retrieved = all(((record.get("config") or {}).get("candidates") or {}).get("source") == "retriever" for _, record in runs)
    found: dict[Hashable, list[_Run]] = {}
    for cell, record in runs:
        found.setdefault((record["passport"]["filters"].get("seed"), retrieved and cell.seed), []).append((cell, record))
    return found


def same_users(what: str, users: Mapping[str, Sequence[str]], apart: str = APART) -> int | None:
    """The number of users, which must be the same for every name; None without names. Arguments as :func:`check`."""
    if not users:
        return None
    (name, one), *others = users.items()
    for other_name, other in others:
        if other != one:
            odd = sorted(set(one) ^ set(other))
            raise ValueError(
                f"{what}: {name} ({len(one)} users) and {other_name} ({len(other)} users) have different users "
                f"({odd[0]!r} is in one only); run them on the same data, or {apart}"
            )
    return len(one)


def same_items(what: str, ranked: Mapping[str, Sequence[tuple[str | None, ...]]], apart: str = APART) -> None:
    """Refuse names with other :func:`ranked_items`, which seeds that draw their own have; arguments as :func:`check`."""
    (name, one), *others = ranked.items()
    for other_name, other in others:
        if {*other} != {*one}:
            raise ValueError(
                f"{what}: {name} and {other_name} ranked other targets or candidates, since these depend on the seed; compare "
                f"the same seeds, or {apart}"
            )


def candidates(record: Mapping[str, Any] | None) -> str | None:
    """The SHA-256 of the test candidates; None after a full ranking."""
    digests = (record or {}).get("candidates_sha256")
    digest = digests.get("test") if isinstance(digests, Mapping) else None
    return digest if isinstance(digest, str) else None


def ranked_items(record: Mapping[str, Any] | None) -> tuple[str | None, ...]:
    """Identifies targets and candidates of a run that has passed :func:`check`; seeds may have their own."""
    passport = (record or {}).get("passport") or {}
    return candidates(record), *passports.identity(passport)


def sizes(record: Mapping[str, Any]) -> dict[str, int]:
    """The number of users of each slice of a run, the same for all of its rows."""
    rows = (record.get("slices") or {}).values()
    return {name: part["users"] for row in rows for name, part in (row or {}).items() if "users" in (part or {})}


def _alike(
    what: str, apart: str, runs: Sequence[_Run], key: Callable[[Mapping[str, Any]], Hashable], says: Callable[..., str]
) -> None:
    """Refuse runs whose records have different keys; ``says`` tells how some differ from the most common ones, and a remedy."""
    groups: dict[Hashable, list[_Run]] = {}
    for cell, record in runs:
        groups.setdefault(key(record), []).append((cell, record))
    if len(groups) > 1:
        most, odd, *_ = sorted(groups.values(), key=lambda group: -len(group))
        raise ValueError(f"{what}: {says(_names(odd), odd[0][1], _names(most), most[0][1])}, or {apart}")


def _other_split(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    datasets = [(record.get("config") or {}).get("dataset") for record in (one, other)]
    if None not in datasets and datasets[0] != datasets[1]:
        return f"{odd} is a run on {datasets[0]}, and {most} on {datasets[1]}; run them on the same data"
    how = "; ".join(passports.differences(one["passport"], other["passport"]))
    return f"the split of {odd} is not that of {most}: {how}; run them on the same data with the same filters"


def _users(record: Mapping[str, Any]) -> int | None:
    """The number of test users that a run was to evaluate."""
    whole = ((record["passport"].get("counts") or {}).get("targets") or {}).get("test")
    chosen = (record.get("config") or {}).get("eval_users")
    return chosen if whole is None or (chosen is not None and chosen < whole) else whole


def _other_users(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    return f"{odd} evaluated {_users(one)} users, and {most} {_users(other)}; give all models the same eval_users"


def _masking(record: Mapping[str, Any]) -> bool | None:
    return record["protocol"]["mask_history"]


def _other_masking(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    drawn = None in (_masking(one), _masking(other))
    remedy = "give all models the same mode in eval_args" if drawn else "set mask_history to one value for all models"
    first, second = (_MASKING[_masking(record)] for record in (one, other))
    return f"{odd} {first}, but {most} {second}; {remedy}"


def _other_targets(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    first, second = (record["protocol"].get("targets") for record in (one, other))
    return (
        f"users have several test items, which {odd} ranked {first}, and {most} ranked {second} (RecBole ranks them one "
        "by one for sequential models, together for all others); such results cannot be compared: give eval_args one target for "
        "each user, {'split': {'LS': 'valid_and_test'}}, leave out the shortcuts (shortcuts: False)"
    )


def _size(record: Mapping[str, Any], name: str) -> int:
    return sizes(record)[name]


def _other_slice(name: str, odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    return (
        f"the slice {name} has {_size(one, name)} users for {odd}, and {_size(other, name)} for {most}; give all models the same "
        "slices"
    )


def mode(record: Mapping[str, Any]) -> str | None:
    """RecBole's mode at test, such as ``uni100``: what is ranked if there is no candidate file."""
    arguments = (record.get("config") or {}).get("eval_args") or {}
    return (arguments.get("mode") or {}).get("test")


def _ranked(record: Mapping[str, Any]) -> str:
    digest = candidates(record)
    return f"the candidates {digest}" if digest else f"the items of mode {mode(record)}"


def _other_candidates(odd: str, one: Mapping[str, Any], most: str, other: Mapping[str, Any]) -> str:
    return (
        f"{odd} ranked {_ranked(one)}, but {most} ranked {_ranked(other)}; such results cannot be compared: run them on the same "
        "candidates"
    )


def _names(runs: Sequence[_Run], most: int = 3) -> str:
    names = [f"{cell.label} (seed {cell.seed})" for cell, _ in runs]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
