"""Candidate files: a table like RecBole's atomic files, one line per user, in tokens instead of internal ids.

A generated file has a companion, ``<name>.json``, with the SHA-256 of its bytes and of everything that it was drawn from. If
either has changed, the file is regenerated. A file of the user has no companion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from logging import getLogger
from pathlib import Path

import torch

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.store.files import atomic_write, sha256_file
from recbole_llm.store.json_files import read_object
from recbole_llm.store.locks import locked

logger = getLogger()

_HEADER = "user_id:token\titem_id:token\tcandidates:token_seq"


def candidate_path(folder: Path, *, dataset: str, split: str, source: str, number: int, seed: int, scenario: str = "") -> Path:
    """Where the candidates of a dataset, scenario and split are stored."""
    return folder / ".".join(filter(None, [dataset, scenario, split, f"{source}{number}-{seed}", "candidates"]))


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
    """Read the candidates of ``users[N]`` and ``targets[N]`` from ``path``; generate the file if it is absent.

    A file that is damaged or was drawn from something else is regenerated, with a warning that says why.

    Args:
        draw_items: returns LongTensor[N, C].
        drawn_from: fingerprint of each thing that ``draw_items`` depends on, by the name that the log uses.
        target_required: whether the target must be among the candidates.
    """
    origin_path = path.with_name(f"{path.name}.json")

    def load() -> CandidateSet:
        content = path.read_bytes()
        digest = _check_origin(origin_path, drawn_from)
        try:
            found = _parse(content, user_ids, item_ids, target_required)
        except ValueError as error:
            raise ValueError(f"it is damaged, {error}") from None
        if found.sha256 != digest:
            raise ValueError(f"it is damaged, its SHA-256 is not the one in {origin_path.name}")
        found.lookup(users, targets)
        return found

    with locked(path, "candidates"):
        try:
            return load()
        except FileNotFoundError:
            pass
        except ValueError as error:
            logger.warning(f"{path} is regenerated: {error}")
        write_candidates(path, users, targets, draw_items(), user_ids, item_ids)
        atomic_write(origin_path, json.dumps({"sha256": sha256_file(path), "drawn_from": dict(drawn_from)}, indent=1))
        return load()


def _check_origin(file: Path, drawn_from: Mapping[str, str]) -> str:
    """The SHA-256 in a companion file; a ValueError if its candidates were not drawn from ``drawn_from``."""
    try:
        origin = read_object(file, 2**24)
        before, digest = dict(origin["drawn_from"]), str(origin["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{file.name}, which records what it was drawn from, is missing or damaged") from None
    changed = [name for name in {**drawn_from, **before} if before.get(name) != drawn_from.get(name)]
    if changed:
        raise ValueError(f"what it was drawn from has changed: {', '.join(changed)}")
    return digest


def write_candidates(
    path: Path,
    users: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
) -> None:
    """Write ``users[N]``, ``targets[N]``, ``items[N, C]`` as tokens, sorted by user token, atomically."""
    spaced = next((token for token in item_ids[1:] if token.split() != [token]), None)
    if spaced is not None:
        raise ValueError(
            f"candidates: item id {spaced!r} is empty or contains white space, which separates items in {path}; "
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
    """Read a candidate file, generated or the user's, and check every line.

    Use ``target_required=False`` for candidates of a retriever, which may have missed the target.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or does not fit the dataset; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"candidates: there is no file {path}")
    try:
        return _parse(path.read_bytes(), user_ids, item_ids, target_required)
    except ValueError as error:
        raise ValueError(f"candidates: {path}, {error}; correct the file, or delete it to regenerate it") from None


def _parse(content: bytes, user_ids: Sequence[str], item_ids: Sequence[str], target_required: bool) -> CandidateSet:
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
            length = len(next(iter(rows.values()), items))
            if len(items) != length:
                raise ValueError(f"{len(items)} candidates, but {length} in line 2")
            if len(set(items)) != len(items):
                raise ValueError("duplicate candidates")
            if target_required and target not in items:
                raise ValueError("the target is not among the candidates")
            if (user, target) in rows:
                raise ValueError("an earlier line has the same user and target")
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
        raise ValueError(f"user {user!r} is not in the dataset")
    tokens = candidates.split(" ")
    unknown = [token for token in (target, *tokens) if token not in item_of]
    if unknown:
        raise ValueError(f"items {unknown[:5]} are not in the dataset")
    return user_of[user], item_of[target], [item_of[token] for token in tokens]
