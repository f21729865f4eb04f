"""Candidate files: a table like RecBole's atomic files, one line per user, in tokens instead of internal ids.

Beside a file that we draw stands ``<name>.json`` with the SHA-256 of its bytes and of everything that it was drawn from.
Where either has changed, the candidates are drawn anew. A file of the user's own has no such companion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from logging import getLogger
from pathlib import Path

import torch
from filelock import FileLock

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.store.files import atomic_write

logger = getLogger()

_HEADER = "user_id:token\titem_id:token\tcandidates:token_seq"


def candidate_path(folder: Path, *, dataset: str, split: str, source: str, number: int, seed: int, scenario: str = "") -> Path:
    """Where the candidates of a dataset, scenario and split are stored."""
    return Path(folder) / ".".join(filter(None, [dataset, scenario, split, f"{source}{number}-{seed}", "candidates"]))


def load_or_draw(
    path: Path,
    users: torch.Tensor,
    targets: torch.Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    draw_items: Callable[[], torch.Tensor],
    drawn_from: Mapping[str, str],
    *,
    target_required: bool = True,
) -> CandidateSet:
    """The set stored at ``path`` for ``users[N]`` and ``targets[N]``, drawn first if it is absent.

    It is drawn anew, and the log says why, if the file is damaged or was drawn from something else. What is used is always
    what stands in the file.

    Args:
        draw_items: returns LongTensor[N, C].
        drawn_from: fingerprint of each thing that ``draw_items`` depends on, by the name that the log gives it.
    """

    def stored() -> CandidateSet:
        content = path.read_bytes()
        written = _check_origin(path, drawn_from)
        try:
            found = _parse(content, user_ids, item_ids, target_required)
        except ValueError as error:
            raise ValueError(f"it is damaged, {error}") from None
        if found.sha256 != written:
            raise ValueError(f"it is damaged, its SHA-256 is not the one in {_origin_path(path).name}")
        found.lookup(users, targets)
        return found

    try:
        return stored()
    except (FileNotFoundError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        try:
            return stored()  # of two runs, one draws and one waits
        except FileNotFoundError:
            pass
        except ValueError as error:
            logger.warning(f"{path} is drawn anew: {error}")
        write_candidates(path, users, targets, draw_items(), user_ids, item_ids)
        found = read_candidates(path, user_ids, item_ids, target_required=target_required)
        origin = {"sha256": found.sha256, "drawn_from": dict(drawn_from)}
        atomic_write(_origin_path(path), json.dumps(origin, indent=1))
    return found


def _origin_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _check_origin(path: Path, drawn_from: Mapping[str, str]) -> str:
    """The SHA-256 that a file was written with; a ValueError if it was drawn from something else than ``drawn_from``."""
    file = _origin_path(path)
    try:
        origin = json.loads(file.read_text())
        before, written = dict(origin["drawn_from"]), str(origin["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{file.name}, which says what it was drawn from, is missing or damaged") from None
    changed = [name for name in {**drawn_from, **before} if before.get(name) != drawn_from.get(name)]
    if changed:
        raise ValueError(f"what it was drawn from has changed: {', '.join(changed)}")
    return written


def write_candidates(
    path: Path,
    users: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
) -> None:
    """Write ``users[N]``, ``targets[N]``, ``items[N, C]`` as tokens, sorted by user token: the whole file or none."""
    spaced = next((token for token in item_ids[1:] if token.split() != [token]), None)
    if spaced is not None:
        raise ValueError(
            f"candidates: item id {spaced!r} is empty or holds white space, which separates items in {path}; "
            "give the items other ids"
        )
    lines = sorted(
        (user_ids[user], item_ids[target], " ".join(item_ids[item] for item in row))
        for user, target, row in zip(users.tolist(), targets.tolist(), items.tolist(), strict=True)
    )
    atomic_write(path, "\n".join([_HEADER, *map("\t".join, lines), ""]))


def read_candidates(
    path: Path, user_ids: Sequence[str], item_ids: Sequence[str], *, target_required: bool = True
) -> CandidateSet:
    """Read a candidate file, our own or a user's, and check every line.

    ``target_required: False`` allows for candidates of a retriever, which may have missed the target.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or does not fit the dataset; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"candidates: there is no file {path}")
    try:
        return _parse(path.read_bytes(), user_ids, item_ids, target_required)
    except ValueError as error:
        raise ValueError(f"candidates: {path}, {error}; correct the file, or delete it to have it drawn anew") from None


def _parse(content: bytes, user_ids: Sequence[str], item_ids: Sequence[str], target_required: bool) -> CandidateSet:
    """The set that a file's content holds; a ValueError names the line."""
    user_of = {token: user for user, token in enumerate(user_ids) if user}
    item_of = {token: item for item, token in enumerate(item_ids) if item}
    lines = content.decode(errors="replace").split("\n")
    rows: dict[tuple[int, int], list[int]] = {}
    number = 1
    try:
        if lines[0].rstrip("\r") != _HEADER:
            raise ValueError(f"the header must be {_HEADER!r}")
        for number, line in enumerate(lines[1:-1], start=2):  # noqa: B007 (the error names it)
            user, target, items = _parse_line(line, user_of, item_of)
            _check(items, target if target_required else None, next(iter(rows.values()), items))
            if (user, target) in rows:
                raise ValueError("the same user and target stand in an earlier line")
            rows[user, target] = items
        if lines[-1] or not rows:
            raise ValueError("the end is missing, the last line must end in a line break")
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    pairs = torch.tensor(list(rows))  # [N, 2]
    return CandidateSet.of(pairs[:, 0], pairs[:, 1], torch.tensor(list(rows.values())), sha256(content).hexdigest())


def _parse_line(line: str, user_of: Mapping[str, int], item_of: Mapping[str, int]) -> tuple[int, int, list[int]]:
    cells = line.rstrip("\r").split("\t")
    if len(cells) != 3:
        raise ValueError(f"{len(cells)} cells instead of 3 (user, target, candidates)")
    user, target, candidates = cells
    if user not in user_of:
        raise ValueError(f"user {user!r} is not in the data set")
    tokens = candidates.split(" ")
    unknown = [token for token in (target, *tokens) if token not in item_of]
    if unknown:
        raise ValueError(f"items {unknown[:5]} are not in the data set")
    return user_of[user], item_of[target], [item_of[token] for token in tokens]


def _check(items: Sequence[int], target: int | None, first: Sequence[int]) -> None:
    if len(items) != len(first):
        raise ValueError(f"{len(items)} candidates, but {len(first)} in line 2")
    if len(set(items)) != len(items):
        raise ValueError("a candidate stands there twice")
    if target is not None and target not in items:
        raise ValueError("the target is not among the candidates")
