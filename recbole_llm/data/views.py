"""``recbole-llm views``: cut a dataset by its categories into datasets of their own.

Each view is an ordinary folder of atomic files, ``NAME-Category``, with a property file that says what its texts are, so that any
model, RecBole's included, runs on it:

    recbole-llm views --dataset=ml-100k
    recbole-llm run --model=SASRec --dataset=ml-100k-Comedy --data_path=views

No item is in two views, so none has the held-out interactions of another in its training data. Never train on the whole dataset
what is tested on a view: the whole has them all.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_llm.data import domains
from recbole_llm.store.files import atomic_folder

logger = getLogger()

OUT = "--out="


def write_views(config: Any, dataset: Any, out: Path) -> list[Path]:
    """Write the views of a dataset below ``out``; returns their folders, the largest category first.

    ``domain_field``, ``domain_min_users`` and ``domain_max_views`` choose as they do for in-run views
    (:func:`recbole_llm.data.domains.views`), by the training split alone. An item of several chosen categories goes to the
    smallest of them. Lines are those of the dataset's own files, all columns kept, less what RecBole's filters leave out.

    Raises:
        FileExistsError: a view is there already; nothing is overwritten.
        ValueError: as ``domains.views``.
    """
    whole = domains.of_dataset(config, dataset)
    field = config["domain_field"] or config["category_field"]
    found = domains.views(
        whole, field, at_least=config["domain_min_users"], at_most=config["domain_max_views"], key="domain_field"
    )
    chosen = [view.name.split("/", 1)[1] for view in found]
    folders = [out / f"{whole.name}-{re.sub(r'[^A-Za-z0-9_-]+', '_', category)}" for category in chosen]
    for folder in folders:
        if folder.exists() or folders.count(folder) > 1:
            raise FileExistsError(f"{OUT}{out}: {folder} is there already; remove it or give another folder")

    of_item = _assigned([set(text.split()) for text in whole.items.fields[field]], chosen)
    histories, source = dataset.histories, Path(dataset.dataset_path) / dataset.dataset_name
    keys = [config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]]
    for category, folder in zip(chosen, folders, strict=True):
        items = {(token,) for token, own in zip(histories.item_ids, of_item, strict=True) if own == category}
        pairs = {
            (histories.user_ids[user], token)
            for user, row in enumerate(histories.items)
            for token in np.asarray(histories.item_ids)[row].tolist()
            if (token,) in items
        }
        with atomic_folder(folder) as draft:
            for suffix, fields, kept in ((".inter", keys, pairs), (".item", keys[1:], items)):
                lines = _kept_lines(source.with_name(source.name + suffix), fields, kept)
                (draft / f"{folder.name}{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
            settings = {key: config[key] for key in sorted(config.dataset_keys())}
            (draft / f"{folder.name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        logger.info(f"view {folder.name}: {len(items)} items, {len(pairs)} interactions")
    return folders


def _assigned(categories: Sequence[set[str]], chosen: Sequence[str]) -> list[str | None]:
    """One of the chosen categories for each item, the one with the fewest items; None where it has none of them."""
    sizes = {category: sum(category in own for own in categories) for category in chosen}
    smallest = sorted(chosen, key=lambda category: (sizes[category], category))
    return [next((category for category in smallest if category in own), None) for own in categories]


def _kept_lines(file: Path, fields: Sequence[str], kept: Container[tuple[str, ...]]) -> Iterator[str]:
    """The header of an atomic file and those of its lines whose ``fields`` are among ``kept``."""
    header, *lines = file.read_bytes().decode("utf-8-sig").split("\n")
    columns = [column.rsplit(":", 1)[0] for column in header.rstrip("\r").split("\t")]
    places = [columns.index(field) for field in fields]
    yield header.rstrip("\r")
    for line in lines:
        cells = line.rstrip("\r").split("\t")
        if len(cells) > max(places) and tuple(cells[place] for place in places) in kept:
            yield line.rstrip("\r")
