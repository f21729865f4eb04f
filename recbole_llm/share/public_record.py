"""The record of a run as it is shared: without users, without paths of this machine, and without what belongs to it alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from recbole_llm.config.key_groups import BOOKKEEPING
from recbole_llm.share.base_models import BaseModel
from recbole_llm.store.json_files import CHECKSUM
from recbole_llm.store.shared_runs import FOLDER

# a plan is of this machine, as are the files that it read; published answers are of single users
_LEFT_OUT = ("plan", "published", "predictions", "inputs", CHECKSUM)
_OF_THIS_MACHINE = BOOKKEEPING - {"note"}
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def public_record(
    record: Mapping[str, Any], bases: Iterable[BaseModel], *, stages: Iterable[str], root: Path, user_ids: bool
) -> dict[str, Any]:
    """The content of the shared record.

    Args:
        bases: the base models; of a folder, the name alone is shared.
        stages: names of the stages that are shared.
        root: the run's ``checkpoint_dir``.
        user_ids: keep the ranks by user; otherwise they are numbered in an order that does not depend on the users.
    """
    shared = set(stages)
    found = {key: value for key, value in record.items() if key not in _LEFT_OUT}
    found["stages"] = {name: folder for name, folder in record["stages"].items() if name in shared}
    found["config"] = {key: value for key, value in record["config"].items() if key not in _OF_THIS_MACHINE}
    for base in bases:
        if Path(str(found["config"][base.key])).expanduser().exists():
            found["config"][base.key] = base.name if base.on_hub else FOLDER + base.name
    found["user_ids"] = user_ids  # for whoever compares runs user by user
    if not user_ids:
        found["slice_users"] = {}
        found["ranks"] = anonymous(record["ranks"])
    return without_paths(found, [*_paths(record), str(root), os.getcwd(), str(Path.home())])


def anonymous(ranks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The ranks of each row, of users numbered by their ranks, so that rows can still be compared user by user."""
    users = list(dict.fromkeys(user for row in ranks.values() for user in row))
    users.sort(key=lambda user: [_order(row[user]) if user in row else (2, 0) for row in ranks.values()])
    numbers = {user: str(number) for number, user in enumerate(users, start=1)}
    return {name: {number: row[user] for user, number in numbers.items() if user in row} for name, row in ranks.items()}


def _order(rank: float | None) -> tuple[int, float]:
    return (1, 0.0) if rank is None else (0, rank)


def _is_path(text: str) -> bool:
    """Whether a text is an absolute path, and not a separator or a template that begins with a slash."""
    if "\n" in text:
        return False
    deep = os.path.isabs(text) and (len(Path(text).parts) > 2 or Path(text).exists()) and len(text) > 1
    return deep or text.startswith("~/") or bool(_WINDOWS.match(text))


def _paths(value: Any) -> Iterator[str]:
    """The folders of all values that are absolute paths."""
    if isinstance(value, str):
        if _is_path(value) and len(Path(value).parts) > 2:
            yield str(Path(value).parent)
    else:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for part in parts:
            yield from _paths(part)


def without_paths(value: Any, folders: Iterable[str]) -> Any:
    """``value`` with the last part of a path in place of every absolute path, and of every path below one of ``folders``."""
    # longest first; a folder such as / would match everything
    known = sorted({folder for folder in folders if len(folder) > 2}, key=len, reverse=True)
    within = re.compile(rf"(?:{'|'.join(map(re.escape, known))})[^\s'\",;()]*") if known else None

    def cleaned(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {cleaned(str(key)): cleaned(entry) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return [cleaned(entry) for entry in part]
        if not isinstance(part, str):
            return part
        if _is_path(part):
            return _name(part)
        return part if within is None else within.sub(lambda found: _name(found[0]), part)

    return cleaned(value)


def _name(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else Path(path)).name or "folder"
