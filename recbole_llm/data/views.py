"""``recbole-llm views``: split a dataset by its categories into several datasets.

Each view is a folder of atomic files, ``NAME-Category``, with a property file that names its text columns, so any model runs on
it, RecBole's included:

    recbole-llm views --dataset=ml-100k
    recbole-llm run --model=SASRec --dataset=ml-100k-Comedy --data_path=views

Views share no items, so the training data of one contains no held-out interactions of another. Do not test a model on a view if
it was trained on the whole dataset, which contains the held-out interactions of the view.
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
from recbole_llm.data.atomic_files import AtomicFile, AtomicFormat
from recbole_llm.store.files import atomic_folder

logger = getLogger()


def write_views(config: Any, dataset: Any, out: Path) -> list[Path]:
    """Write the views of a dataset below ``out``; returns their folders, the largest category first.

    ``domain_field``, ``domain_min_users`` and ``domain_max_views`` choose as they do for in-run views
    (:func:`recbole_llm.data.domains.views`), from the training split alone. An item of several chosen categories belongs to the
    smallest of them, and a view with too few users after that is left out. Lines are copied from the dataset's files with all
    columns, except those that RecBole's filters remove.

    Raises:
        FileExistsError: a view exists; nothing is overwritten.
        ValueError: as ``domains.views``.
    """
    whole = domains.of_dataset(config, dataset)
    field: Any = config["domain_field"] or whole.items.columns.get("category_field")
    found = domains.views(
        whole, field, at_least=config["domain_min_users"], at_most=config["domain_max_views"], key="domain_field"
    )
    categories = [set(values) for values in whole.items.values(field)]
    chosen, of_item = _disjoint(whole, categories, [view.name.split("/", 1)[1] for view in found], config["domain_min_users"])
    folders = [out / f"{whole.name}-{re.sub(r'[^A-Za-z0-9_-]+', '_', category)}" for category in chosen]
    for folder in folders:
        if folder.exists() or folders.count(folder) > 1:
            raise FileExistsError(f"--out={out}: {folder} exists; remove it or give another folder")

    form = AtomicFormat.of(config)
    histories, source = dataset.histories, Path(dataset.dataset_path) / dataset.dataset_name
    keys = [config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]]
    for category, folder in zip(chosen, folders, strict=True):
        items = {(token,) for token, own in zip(histories.item_ids, of_item, strict=True) if own == category}
        pairs = {
            (user, histories.item_ids[item])
            for user, row in zip(histories.user_ids, histories.items, strict=True)
            for item in row.tolist()
            if of_item[item] == category
        }
        with atomic_folder(folder) as draft:
            for suffix, fields, kept in ((".inter", keys, pairs), (".item", keys[1:], items)):
                lines = _kept_lines(AtomicFile(source.with_name(source.name + suffix), form), fields, kept)
                (draft / f"{folder.name}{suffix}").write_text("\n".join(lines) + "\n", encoding=form.encoding, newline="\n")
            named = {f"{what}_FIELD" for what in ("USER_ID", "ITEM_ID", "TIME", "RATING")}
            described = sorted({*config.dataset_keys(), *named, "rm_dup_inter"})  # whose lines are not removed
            settings = {key: config[key] for key in described} | form.as_dict()
            (draft / f"{folder.name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        logger.info(f"view {folder.name}: {len(items)} items, {len(pairs)} interactions")
    return folders


def _disjoint(
    whole: domains.Domain, categories: Sequence[set[str]], chosen: Sequence[str], at_least: int
) -> tuple[list[str], list[str | None]]:
    """The categories of which ``at_least`` users have two items that no smaller one takes, and the category of each item.

    The smallest category, which keeps all of its items, is always one of them.
    """
    left = list(chosen)
    while True:
        of_item = np.array(_assigned(categories, left), dtype=object)
        users = dict.fromkeys(left, 0)
        for history in whole.histories:
            own, counts = np.unique([category for category in of_item[history] if category is not None], return_counts=True)
            users |= {category: users[category] + 1 for category in own[counts >= 2].tolist()}
        if not (few := [category for category in left if users[category] < at_least]):
            return left, of_item.tolist()
        least = min(few, key=lambda category: (users[category], category))
        logger.info(f"view {whole.name}-{least}: left out, {users[least]} users have two of the items that no smaller view takes")
        left.remove(least)


def _assigned(categories: Sequence[set[str]], chosen: Sequence[str]) -> list[str | None]:
    """The chosen category of each item with the fewest items; None for an item of no chosen category."""
    sizes = {category: sum(category in own for own in categories) for category in chosen}
    smallest = sorted(chosen, key=lambda category: (sizes[category], category))
    return [next((category for category in smallest if category in own), None) for own in categories]


def _kept_lines(file: AtomicFile, fields: Sequence[str], kept: Container[tuple[str, ...]]) -> Iterator[str]:
    """The header of an atomic file and the lines whose ``fields`` are in ``kept``."""
    separator, places = file.form.field_separator, [[*file.types].index(field) for field in fields]
    yield separator.join(f"{name}:{kind}" for name, kind in file.types.items())
    for _, cells in file.rows():
        if tuple(cells[place] for place in places) in kept:
            yield separator.join(cells)
