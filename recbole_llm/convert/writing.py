"""Converted data as a dataset: ``NAME/NAME.inter``, ``NAME/NAME.item`` and the property file ``NAME/NAME.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from recbole_llm.convert.columns import TEXTS
from recbole_llm.convert.interactions import Interactions
from recbole_llm.convert.values import SEPARATOR
from recbole_llm.store.files import atomic_folder

_BLOCK = 1 << 16  # rows that are turned into text at once


def write_dataset(
    folder: Path,
    data: Interactions,
    items: Iterator[tuple[str, Mapping[str, str]]],
    columns: Mapping[str, str],
    properties: Mapping[str, Any],
    about: Sequence[str],
) -> int:
    """Write a dataset as one folder, which appears when it is complete; returns the number of rows of ``.item``.

    Args:
        items: id and texts by role of each item.
        columns: names of the columns of ``.item`` by role; without any there is no such file.
        properties: the lines of the property file.
        about: comments at its top.
    """
    name, rows = folder.name, 0
    with atomic_folder(folder) as draft:
        with open(draft / f"{name}.inter", "w", encoding="utf-8", newline="\n") as file:
            _write_interactions(file, data)
        if columns:
            with open(draft / f"{name}.item", "w", encoding="utf-8", newline="\n") as file:
                kinds = {role: "token_seq" if role == "category" else "token" for role in columns}
                file.write("\t".join(["item_id:token", *(f"{columns[role]}:{kinds[role]}" for role in columns)]) + "\n")
                for token, texts in items:
                    file.write("\t".join([token, *(texts[role] for role in columns)]) + "\n")
                    rows += 1
        lines = {f"{role}_field": columns[role] for role in TEXTS if role in columns}
        lines |= {"seq_separator": SEPARATOR} if "category" in columns else {}
        text = yaml.safe_dump({**lines, **properties}, sort_keys=False, allow_unicode=True)
        (draft / f"{name}.yaml").write_text("".join(f"# {line}\n" for line in about) + text, encoding="utf-8")
    return rows


def _write_interactions(file: TextIO, data: Interactions) -> None:
    rated = data.ratings is not None
    file.write("user_id:token\titem_id:token\t" + "rating:float\t" * rated + "timestamp:float\n")
    for start in range(0, len(data.users), _BLOCK):
        part = slice(start, start + _BLOCK)
        cells = [[data.user_ids[user] for user in data.users[part].tolist()]]
        cells.append([data.item_ids[item] for item in data.items[part].tolist()])
        if data.ratings is not None:
            cells.append([f"{rating:.10g}" for rating in data.ratings[part].tolist()])
        cells.append([_time(time) for time in data.times[part].tolist()])
        file.writelines("\t".join(row) + "\n" for row in zip(*cells, strict=True))


def _time(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds.is_integer() else repr(float(seconds))


def used(data: Interactions) -> set[str]:
    """The ids of the items that have interactions."""
    return {data.item_ids[item] for item in np.unique(data.items).tolist()}
