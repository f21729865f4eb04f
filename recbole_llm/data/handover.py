"""``recbole-llm data export``: the split of a dataset for other frameworks, whose predictions ``--model=Imported`` evaluates.

======================================  =====================================================================================
``<dataset>-split/``                    atomic files of RecBole: all interactions, pre-split ones, item texts, settings;
                                        RecBole reads its own copy of ml-100k under that name
``rectools/*.parquet``                  interactions with the columns of RecTools
``train.parquet``, ``valid.parquet``,   user, item, timestamp; rows in time order
``test.parquet``
``items.parquet``                       item and its texts
``candidates.valid.parquet`` and        user, slot, item: the drawn candidates in the order of the candidate file, without a mark
``candidates.test.parquet``             on the target
``split.json``                          what the split is: settings, counts, hashes
======================================  =====================================================================================

The tables are those that RecBole's general models are given: filtered, and split by ``eval_args``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.items import ItemTexts, refuse_given
from recbole_llm.store.files import atomic_folder, fingerprint

logger = getLogger()

PHASES = ("train", "valid", "test")
USER, ITEM, TIME, TITLE = "user", "item", "timestamp", "title"
_EXACT = 2**24  # whole numbers below it are exact in float32, RecBole's type of a timestamp
_WORDS = ("noun", "verb", "verb_base")


def write_split(config: Any, dataset: Any, out: Path) -> list[Path]:
    """Write the split of ``dataset``, which is not split yet, to the new folder ``out``; returns its files.

    Raises:
        FileExistsError: ``out`` exists; nothing is overwritten.
        ValueError: candidates of a retriever, which would have to be trained; an id that atomic files cannot contain; or too
            many interactions.
    """
    if out.exists():
        raise FileExistsError(f"--out={out}: it exists; remove it or give another folder")
    if config["candidate_phases"] and config["candidates"]["source"] == "retriever":
        raise ValueError(
            "candidates: those of a retriever need its training; export another source, or set eval_args to mode full"
        )
    candidates, texts, name = candidate_sets(config, dataset), _texts(dataset), config["dataset"]
    users, items = (list(map(str, dataset.field2id_token[field])) for field in (dataset.uid_field, dataset.iid_field))
    parts = _split(dataset, users, items)
    with atomic_folder(out) as folder:
        _write_atomic(folder / f"{name}-split", parts, texts, items, config)
        _write_rectools(folder / "rectools", parts)
        for phase, part in parts.items():
            part.drop(columns="order").to_parquet(folder / f"{phase}.parquet", index=False)
        if texts is not None:
            pd.DataFrame({ITEM: items, TITLE: texts.titles, **texts.fields})[1:].to_parquet(folder / "items.parquet", index=False)
        for phase, found in candidates.items():
            _candidates(found, users, items).to_parquet(folder / f"candidates.{phase}.parquet", index=False)
        about = {
            "dataset": name,
            "eval_args": config["eval_args"],
            "rows": {phase: len(part) for phase, part in parts.items()},
            "users": len(users) - 1,
            "items": len(items) - 1,
            "sha256": {phase: fingerprint(part[[USER, ITEM]].to_numpy().tolist()) for phase, part in parts.items()},
            "candidates_sha256": {phase: found.sha256 for phase, found in candidates.items()},
        }
        (folder / "split.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    logger.info(f"{out}: " + ", ".join(f"{len(part)} {phase}" for phase, part in parts.items()) + " interactions")
    return sorted(file for file in out.rglob("*") if file.is_file())


def _texts(dataset: Any) -> ItemTexts | None:
    """The texts; a column that has the name of one that is written beside it is called ``<name>_text``."""
    try:
        texts = dataset.item_texts
    except (FileNotFoundError, ValueError) as error:
        refuse_given(dataset.config, error)
        logger.info(f"no item texts are exported: {error}")
        return None
    names = {field: f"{field}_text" if field in (ITEM, "item_id", TITLE) else field for field in texts.fields}
    return replace(
        texts,
        fields={names[field]: values for field, values in texts.fields.items()},
        kinds={names.get(field, field): kind for field, kind in texts.kinds.items()},
        columns={key: names[field] for key, field in texts.columns.items()},
    )


def _split(dataset: Any, users: Sequence[str], items: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Tables by phase with the columns user, item, timestamp (if there is one) and order, the place in time among all rows.

    During the split, the place replaces the timestamp: it leaves no ties, and it identifies the row.
    """
    frame, times = dataset.inter_feat.copy(), None
    place = np.arange(len(frame), dtype=np.int64)
    if dataset.time_field in frame:
        if len(frame) >= _EXACT:
            raise ValueError(f"data export: {len(frame)} interactions; RecBole's float32 keeps the order of {_EXACT - 1} at most")
        times = frame[dataset.time_field].to_numpy()
        place[dataset.time_order] = np.arange(len(frame))  # rows of equal times are in the order of the split
        dataset.inter_feat[dataset.time_field] = place.astype(np.float64)
    found = {}
    for phase, split in zip(PHASES, dataset.build(), strict=True):
        part = split.inter_feat
        table = {
            USER: np.array(users, dtype=object)[part[dataset.uid_field].numpy()],
            ITEM: np.array(items, dtype=object)[part[dataset.iid_field].numpy()],
        }
        order = np.arange(len(part))
        if times is not None:
            order = part[dataset.time_field].numpy().astype(np.int64)
            table[TIME] = times[np.argsort(place)[order]]
        found[phase] = pd.DataFrame({**table, "order": order}).sort_values("order", ignore_index=True)
    return found


def _write_atomic(
    folder: Path, parts: Mapping[str, pd.DataFrame], texts: ItemTexts | None, items: Sequence[str], config: Any
) -> None:
    """RecBole's atomic files. The timestamp is the place in time, which float32 holds exactly and which has no ties."""
    folder.mkdir()
    timed = all(TIME in part for part in parts.values())
    whole = pd.concat(parts.values()).sort_values("order", kind="stable") if timed else pd.concat(parts.values())
    for suffix, part in {"": whole, **{f".{phase}": part for phase, part in parts.items()}}.items():
        columns = {"user_id:token": part[USER], "item_id:token": part[ITEM]}
        columns |= {"timestamp:float": part["order"].map(str)} if timed else {}
        _write_table(folder / f"{folder.name}{suffix}.inter", columns)
    if texts is None:
        return
    columns = {"item_id:token": items[1:], f"{TITLE}:token_seq": texts.titles[1:]}
    columns |= {f"{field}:{texts.kinds[field]}": values[1:] for field, values in texts.fields.items()}
    _write_table(folder / f"{folder.name}.item", columns)
    settings = {"title_field": TITLE, **texts.columns, **{key: config[key] for key in _WORDS}, "seq_separator": texts.separator}
    (folder / f"{folder.name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")


def _write_table(file: Path, columns: Mapping[str, Sequence[str]]) -> None:
    for head, values in columns.items():
        if odd := next((value for value in values if any(sign in value for sign in "\t\r\n")), None):
            raise ValueError(
                f"data export: {odd!r} ({head}) contains a tab or a line break, which atomic files cannot; rename it"
            )
    lines = map("\t".join, zip(*columns.values(), strict=True))
    file.write_text("\n".join(["\t".join(columns), *lines, ""]), encoding="utf-8", newline="\n")


def _write_rectools(folder: Path, parts: Mapping[str, pd.DataFrame]) -> None:
    """``train``, ``train_valid`` (what a model may read at test) and ``test``, with increasing times: RecTools sorts by them."""
    folder.mkdir()
    tables = {"train": [parts["train"]], "train_valid": [parts["train"], parts["valid"]], "test": [parts["test"]]}
    for name, given in tables.items():
        table = pd.concat(given).sort_values("order", kind="stable", ignore_index=True)
        times = _increasing(table[TIME].to_numpy() if TIME in table else table["order"].to_numpy())
        content = {"user_id": table[USER], "item_id": table[ITEM], "weight": 1.0, "datetime": times}
        pd.DataFrame(content).to_parquet(folder / f"{name}.parquet", index=False)


def _increasing(times: np.ndarray) -> pd.Series:
    """Sorted Unix times [N], in seconds or thousandths, millionths or billionths, as dates of which none equals another.

    Ties are a microsecond apart.
    """
    largest = float(np.abs(times[[0, -1]]).max()) if len(times) else 0.0
    unit = next((unit for limit, unit in ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0)) if largest < limit), 1e-3)  # microseconds
    steps = np.arange(len(times))
    ticks = np.maximum.accumulate((times * unit).astype(np.int64) - steps) + steps
    return pd.Series(pd.to_datetime(ticks, unit="us"))


def _candidates(found: CandidateSet, users: Sequence[str], items: Sequence[str]) -> pd.DataFrame:
    count, width = found.items.shape
    return pd.DataFrame(
        {
            USER: np.array(users, dtype=object)[found.users.numpy()].repeat(width),
            "slot": np.tile(np.arange(width), count),
            ITEM: np.array(items, dtype=object)[found.items.flatten().numpy()],
        }
    )
