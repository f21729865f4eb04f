"""Run records on disk: written with a checksum, and read only if they are whole and agree with themselves.

A leaderboard shows what stands in records, so it must not show a figure that the ranks of the same record contradict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.evaluation import metrics
from recbole_llm.store import runs
from recbole_llm.store.files import DamagedError, is_within
from recbole_llm.store.json_files import CHECKSUM, checksum, read_object

_DECIMALS = 4  # RecBole's `metric_decimal_place`


class DamagedRecordError(DamagedError):
    """A record that cannot be used. The message names the file, the fault and the remedy; ``fault`` has no remedy."""

    def __init__(self, path: Path, fault: str, record: Mapping[str, Any]):
        self.fault = f"{path} {fault}"
        super().__init__(f"{self.fault}; {runs.again(record, path, beside=False)}, or delete it")


def by_user(user_ids: Sequence[Any], users: Sequence[int], ranks: Sequence[float]) -> dict[str, int | None]:
    """The ranks [N] of ``users`` [N] as a record has them: by token, None for a missed target."""
    found = zip(users, ranks, strict=True)
    return {str(user_ids[user]): int(rank) if math.isfinite(rank) else None for user, rank in found}


def ranks_of(record: Mapping[str, Any], row: str) -> dict[str, float]:
    """The ranks of a row of a checked record by user, infinite for a missed target; none if users have several targets."""
    return {user: math.inf if rank is None else rank for user, rank in record["ranks"].get(row, {}).items()}


def read_record(path: Path, identity: str | None = None) -> dict[str, Any]:
    """Read and check the record of a run.

    A shared record has no checksum; the other checks hold for it, too.

    Args:
        identity: fingerprint of the run's configuration, if it is known.

    Raises:
        FileNotFoundError: there is no record.
        DamagedRecordError: the record is not what was written, contradicts itself, or is of another run.
    """
    try:
        record = read_object(path)
    except DamagedError as error:
        raise DamagedRecordError(path, str(error).removeprefix(f"{path} "), {}) from error
    if fault := _fault(record, identity):
        raise DamagedRecordError(path, fault, record)
    return record


def _fault(record: Any, identity: str | None) -> str | None:
    """What is wrong with the content of a record."""
    if not isinstance(record, dict) or not _has_form(record):
        return "is damaged: it does not have the form of a record"
    if CHECKSUM in record and record[CHECKSUM] != checksum(record):
        return "is damaged or was edited: its values are not those that the run wrote"
    if identity is not None and record.get("fingerprint") != identity:
        return "is the record of a run with other settings"
    if not {"filters", "sha256"} <= {*record.get("passport", ())} or "mask_history" not in record.get("protocol", ()):
        return "is from an earlier state of this package and does not say how it was measured (passport, mask_history)"
    return _contradiction(record)


def _has_form(record: Mapping[str, Any]) -> bool:
    """Whether the parts that are read as dictionaries are some, and results and ranks are numbers."""
    tables = [record.get(name) for name in ("results", "ranks", "slices")]
    others = [
        record.get(name, {})
        for name in ("config", "passport", "protocol", "stages", "stage_seconds", "seconds", "candidates_sha256")
    ]
    if not all(isinstance(part, dict) for part in (*tables, *others)) or not _has_paths(record):
        return False
    if not isinstance(decimals := _decimals(record), int) or not 0 <= decimals <= 20 or not _has_slice_users(record):
        return False
    results, ranks, _ = ([*table.values()] for table in tables if table is not None)
    if not all(isinstance(row, dict) for table in tables if table is not None for row in table.values()):
        return False
    places = [rank for row in ranks for rank in row.values() if rank is not None]
    return all(map(_is_number, (*places, *(value for row in results for value in row.values())))) and min(places, default=1) >= 1


def _has_slice_users(record: Mapping[str, Any]) -> bool:
    found = record.get("slice_users") or {}
    return isinstance(found, dict) and all(
        isinstance(users, list) and all(isinstance(user, str) for user in users) for users in found.values()
    )


def _has_paths(record: Mapping[str, Any]) -> bool:
    """Whether stages are names of folders, and the checkpoint that of a file with its SHA-256, within ``checkpoint_dir``."""
    named = record.get("checkpoint")
    files = [named.get("file"), named.get("sha256")] if isinstance(named, dict) else [] if named is None else [None]
    stages = record.get("stages", {}).values()
    return all(isinstance(file, str) for file in files) and all(is_within(Path("stages"), name) for name in stages)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _contradiction(record: Mapping[str, Any]) -> str | None:
    """The first row without the ranks that it must have, or the first metric, of a row or of a slice of its users, that is not
    the mean over its ranks, which RecBole rounds.
    """
    tolerance = 0.5 * 10.0 ** -_decimals(record) + 1e-9
    ranked = (record.get("protocol") or {}).get("targets") == "one" and "test" in (record.get("candidates_sha256") or ())
    members = {name: set(users) for name, users in (record.get("slice_users") or {}).items()}  # a shared record has none
    for row, values in record["results"].items():
        ranks = ranks_of(record, row)
        if ranked and not ranks:
            return f"contradicts itself: {row} has no ranks of its users, from which its metrics follow"
        parts = {row: (ranks, values)}
        for name, found in (record["slices"].get(row) or {}).items():
            if name in members and isinstance(found, Mapping):
                own = {user: rank for user, rank in ranks.items() if user in members[name]}
                parts[f"{row}, slice {name}"] = own, {key: value for key, value in found.items() if _is_number(value)}
        for where, (own, shown) in parts.items():
            for name, value in metrics.metrics([*own.values()], shown).items():
                if not abs(value - shown[name]) <= tolerance:  # NaN, too
                    return f"contradicts itself: {name} of {where} is {shown[name]:g}, and {value:.6g} by its ranks"
    return None


def _decimals(record: Mapping[str, Any]) -> Any:
    return record.get("config", {}).get("metric_decimal_place", _DECIMALS)
