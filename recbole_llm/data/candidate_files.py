"""Candidate files: a table like RecBole's atomic files, one line per user, in tokens instead of internal ids.

Blanks separate the candidates of a line. If an item id of the dataset contains white space, the header says so, and white space
and ``%`` in item ids are written as percent escapes (RFC 3986, of UTF-8): ``SKU%2034``.

A generated file has a companion, ``<name>.json``, with the SHA-256 of its bytes and of everything that it was drawn from. If
either has changed, the file is regenerated. A file of the user has no companion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.store.files import atomic_write
from recbole_llm.store.json_files import read_object, read_regular
from recbole_llm.store.locks import locked

logger = getLogger()

_ROWS = 2**14  # that are put together at once
_LARGEST = 2**33  # bytes; the candidates of a million users have a twentieth of them
_HEADER = "user_id:token\titem_id:token\tcandidates:token_seq"
_ESCAPED_HEADER = "user_id:token\titem_id:escaped_token\tcandidates:escaped_token_seq"
_ESCAPES = re.compile(r"[\s%]")


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
        content = read_regular(path, _LARGEST)
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
        found = write_candidates(path, users, targets, draw_items(), user_ids, item_ids)
        atomic_write(origin_path, json.dumps({"sha256": found.sha256, "drawn_from": dict(drawn_from)}, indent=1))
        return found


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
) -> CandidateSet:
    """Write ``users[N]``, ``targets[N]``, ``items[N, C]`` as tokens, sorted by user token, atomically; returns what is read.

    Raises:
        ValueError: an item id is empty, or a user id contains what separates cells.
    """
    header = _HEADER
    if "\n".join(item_ids[1:]).split() != [*item_ids[1:]]:  # a tenth of the time of splitting each
        if "" in item_ids[1:]:
            raise ValueError("candidates: an item id is empty; give the item an id")
        header, item_ids = _ESCAPED_HEADER, _escaped(item_ids)
    joined = "\t".join(user_ids)
    if joined.count("\t") >= len(user_ids) or "\r" in joined or "\n" in joined:
        broken = next(token for token in user_ids if {*token} & {*"\t\r\n"})
        raise ValueError(f"candidates: user id {broken!r} contains what separates cells in {path}; give the users other ids")
    tokens, width = _texts(item_ids), items.size(1)
    own = pa.table({"user": _texts(user_ids).take(pa.array(users.numpy())), "target": tokens.take(pa.array(targets.numpy()))})
    order = pc.sort_indices(own, sort_keys=[("user", "ascending"), ("target", "ascending")])  # of bytes, as of code points
    own, rows = own.take(order), torch.from_numpy(order.to_numpy().astype(np.int64))
    users, targets, items = users[rows], targets[rows], items[rows]
    lines = [f"{header}\n".encode()]
    for start, part in zip(range(0, len(rows), _ROWS), items.split(_ROWS), strict=True):
        listed = _joined(tokens.take(pa.array(part.flatten().numpy())), np.arange(len(part) + 1) * width, " ")
        cells = (column.combine_chunks() for column in own.slice(start, len(part)).columns)
        whole = _joined(pc.binary_join_element_wise(*cells, listed, "\t"), np.array([0, len(part)]), "\n")
        lines += [whole[0].as_buffer().to_pybytes(), b"\n"]
    content = b"".join(lines)
    atomic_write(path, content)
    return CandidateSet.of(users, targets, items, sha256(content).hexdigest())


def _joined(texts: pa.Array, starts: np.ndarray, separator: str) -> pa.Array:
    """The texts from each start [N + 1] to the next one, joined [N]."""
    return pc.binary_join(pa.ListArray.from_arrays(starts.astype(np.int32), texts), separator)


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
        return _parse(read_regular(path, _LARGEST), user_ids, item_ids, target_required)
    except ValueError as error:
        raise ValueError(f"candidates: {path}, {error}; correct the file") from None


def _escape(token: str) -> str:
    return _ESCAPES.sub(lambda found: quote(found[0]), token)


def _escaped(item_ids: Sequence[str]) -> list[str]:
    """The ids with the padding as it is, and in all others white space and ``%`` as percent escapes."""
    return [*item_ids[:1], *map(_escape, item_ids[1:])]


def _texts(tokens: Sequence[str]) -> pa.Array:
    return pa.array([*map(str, tokens)], pa.string())


def _parse(content: bytes, user_ids: Sequence[str], item_ids: Sequence[str], target_required: bool) -> CandidateSet:
    found = _arrays(content, user_ids, item_ids, target_required)
    if found is None:  # reading line by line names the line that is wrong
        found = _lines(content, user_ids, item_ids, target_required)
    return CandidateSet.of(*found, sha256(content).hexdigest())


def _arrays(
    content: bytes, user_ids: Sequence[str], item_ids: Sequence[str], target_required: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Users [N], targets [N] and candidates [N, C] of a file without carriage returns; None if anything about it is wrong."""
    names = [*"uti"]  # user, target, items
    if content.startswith(f"{_ESCAPED_HEADER}\n".encode()):
        item_ids = _escaped(item_ids)
    elif not content.startswith(f"{_HEADER}\n".encode()):
        return None
    if not content.endswith(b"\n") or b"\r" in content:
        return None
    try:
        table = csv.read_csv(
            pa.BufferReader(content),
            csv.ReadOptions(use_threads=False, skip_rows=1, column_names=names),
            csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string()), strings_can_be_null=False),
        ).combine_chunks()
    except pa.ArrowInvalid:
        return None
    if not len(table):
        return None
    owners, targets, listed = (table[name].chunk(0) for name in names)
    cells = pc.split_pattern(listed, " ")
    lengths = pc.list_value_length(cells).to_numpy()
    tokens = zip((owners, targets, cells.flatten()), (user_ids, item_ids, item_ids), strict=True)
    found = [pc.index_in(cell, value_set=_texts(ids[1:]).cast(cell.type)) for cell, ids in tokens]  # places without padding
    if (lengths != lengths[0]).any() or any(places.null_count for places in found):
        return None
    users, own, items = (places.to_numpy().astype(np.int64) + 1 for places in found)
    items = items.reshape(len(users), -1)  # [N, C]
    ranked = np.sort(items, axis=1)
    pairs = np.sort(users * len(item_ids) + own)
    lacking = target_required and not (items == own[:, None]).any(1).all()
    if lacking or (ranked[:, 1:] == ranked[:, :-1]).any() or (pairs[1:] == pairs[:-1]).any():
        return None
    return torch.from_numpy(users), torch.from_numpy(own), torch.from_numpy(items)


def _lines(
    content: bytes, user_ids: Sequence[str], item_ids: Sequence[str], target_required: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users [N], targets [N] and candidates [N, C]; a ValueError names the first line that is wrong."""
    user_of = {token: user for user, token in enumerate(user_ids) if user}
    item_of = {token: item for item, token in enumerate(item_ids) if item}
    lines = content.decode(errors="replace").split("\n")
    rows: dict[tuple[int, int], list[int]] = {}
    number = 1
    try:
        header = lines[0].rstrip("\r")
        if header not in (_HEADER, _ESCAPED_HEADER):
            raise ValueError(f"the header must be {_HEADER!r}, or {_ESCAPED_HEADER!r} if item ids are escaped")
        for number, line in enumerate(lines[1:-1], start=2):  # noqa: B007 (the error names it)
            user, target, items = _parse_line(line, user_of, item_of, escaped=header == _ESCAPED_HEADER)
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
    return pairs[:, 0], pairs[:, 1], torch.tensor(list(rows.values()))


def _parse_line(
    line: str, user_of: Mapping[str, int], item_of: Mapping[str, int], *, escaped: bool
) -> tuple[int, int, list[int]]:
    cells = line.rstrip("\r").split("\t")
    if len(cells) != 3:
        raise ValueError(f"{len(cells)} cells instead of 3 (user, target, candidates)")
    user, target, candidates = cells
    if user not in user_of:
        raise ValueError(f"user {user!r} is not in the dataset")
    tokens = candidates.split(" ")
    if escaped:
        target, *tokens = map(unquote, (target, *tokens))
    unknown = [token for token in (target, *tokens) if token not in item_of]
    if unknown:
        spaced = None if escaped else next((token for token in item_of if token.split() != [token]), None)
        remedy = f"; write ids such as {spaced!r} as {_escape(spaced)!r}, below the header {_ESCAPED_HEADER!r}" if spaced else ""
        raise ValueError(f"items {unknown[:5]} are not in the dataset{remedy}")
    return user_of[user], item_of[target], [item_of[token] for token in tokens]
