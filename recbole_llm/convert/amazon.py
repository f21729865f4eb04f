"""Amazon reviews of 2014, 2018 and 2023: reviews with the metadata beside them, and the tables of ratings."""

from __future__ import annotations

import re
from typing import Any

from recbole_llm.convert.layout import Layout, Texts
from recbole_llm.convert.sources import ConversionError, Source
from recbole_llm.convert.tables import Delimited, JsonLines, Table

_PRODUCTS = {"noun": "product", "verb": "bought", "verb_base": "buy"}
_NAMES = {"brand": "brand", "category": "categories"}
_REVIEWS_2014 = re.compile(r"reviews_(.+?)(?:_5|_10)?\.json(?:\.gz)?")
_RATINGS_2014 = re.compile(r"ratings_(.+?)\.csv(?:\.gz)?")
_REVIEWS = re.compile(r"(?!meta_)(.+?)(?:_5|_10)?\.jsonl?(?:\.gz)?")


def amazon(source: Source) -> Layout | None:
    """Reviews, recognised by their keys; of a folder with several, the user has to name one.

    Raises:
        ConversionError: a folder has the reviews of several categories.
    """
    readers = (_reviews_2014, _ratings_2014, _reviews_2018_or_2023)
    if source.file:
        return next((found for read in readers if (found := read(source, source.file))), None)
    if not any(name.startswith("meta_") for name in source.names):
        return None
    layouts = [found for name in source.names for read in readers if (found := read(source, name))]
    if len(layouts) > 1:
        files = ", ".join(layout.inter.shown for layout in layouts)
        raise ConversionError(f"SOURCE: {source.path} has several files of reviews; give one of them: {files}")
    return layouts[0] if layouts else None


def _reviews_2014(source: Source, name: str) -> Layout | None:
    found = _REVIEWS_2014.fullmatch(name)
    if not found:
        return None
    inter = JsonLines(source, name, literal=True)
    if not {"reviewerID", "asin", "unixReviewTime"} <= {*inter.names}:
        return None
    columns = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"}
    return _with_items("Amazon 2014", source, inter, columns, found[1])


def _ratings_2014(source: Source, name: str) -> Layout | None:
    found = _RATINGS_2014.fullmatch(name)
    if not found:
        return None
    inter = Delimited(source, name, "utf-8", names=("user", "item", "rating", "time"), separator=",")
    if len(inter.sample(["user"], 1)) != 1:
        return None
    return _with_items("Amazon 2014, ratings", source, inter, {name: name for name in inter.names}, found[1])


def _reviews_2018_or_2023(source: Source, name: str) -> Layout | None:
    found = _REVIEWS.fullmatch(name)
    if not found or _REVIEWS_2014.fullmatch(name):
        return None
    inter = JsonLines(source, name)
    if {"reviewerID", "asin", "unixReviewTime"} <= {*inter.names}:
        columns = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"}
        return _with_items("Amazon 2018", source, inter, columns, found[1])
    if {"user_id", "parent_asin", "timestamp"} <= {*inter.names}:
        columns = {"user": "user_id", "item": "parent_asin", "time": "timestamp", "rating": "rating"}
        return _with_items("Amazon 2023", source, inter, columns, found[1])
    return None


def _with_items(name: str, source: Source, inter: Table, columns: dict[str, str], category: str) -> Layout:
    files = [f"meta_{category}.{ending}" for ending in ("json.gz", "json", "jsonl.gz", "jsonl")]
    file = next((one for one in files if one in source.names), None)
    if file is None:
        note = f"there is no {files[2] if '2023' in name else files[0]} beside {inter.shown}, so items have no titles"
        return Layout(name, inter, columns, properties=_PRODUCTS, notes=(note,))
    return Layout(name, inter, columns, JsonLines(source, file, literal=True), metadata_columns(), metadata, _NAMES, _PRODUCTS)


def metadata_columns() -> dict[str, str]:
    """The keys of metadata of all three years."""
    keys = ("asin", "parent_asin", "title", "brand", "store", "details", "categories", "category", "main_category", "description")
    return {"item": "asin", **{key: key for key in keys}}


def metadata(values: Texts) -> Texts:
    """The texts in a line of metadata: 2014 has lists of ``categories``, 2018 ``category``, 2023 ``store`` and ``details``."""
    details = values["details"] if isinstance(values["details"], dict) else {}
    return {
        "item": values["parent_asin"] or values["asin"],
        "title": values["title"],
        "brand": _first(values["brand"], details.get("Brand"), values["store"]),
        "category": _first(values["categories"], values["category"], values["main_category"]),
        "description": values["description"],
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value), None)
