"""Files of other research code: RecBole3.0's folders, and the pairs of SASRec's and A-LLMRec's repositories."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from pathlib import Path

from recbole_llm.convert.amazon import metadata, metadata_columns
from recbole_llm.convert.layout import Layout, Texts
from recbole_llm.convert.sources import Source
from recbole_llm.convert.tables import JsonLines, Plain

_PRODUCTS = {"noun": "product", "verb": "bought", "verb_base": "buy"}
_SENTENCE = re.compile(r"(.+?)\.(?: |$)", re.DOTALL)


def recbole3(source: Source) -> Layout | None:
    """A folder of RecBole3.0: ``processed`` (interactions.jsonl, items.jsonl) or ``raw`` (reviews.jsonl, meta.jsonl)."""
    if source.file not in (None, "interactions.jsonl", "reviews.jsonl"):
        return None
    files = {"interactions.jsonl", "items.jsonl"}, {"reviews.jsonl", "meta.jsonl"}
    read = [reader for names, reader in zip(files, (_processed, _raw), strict=True) if names <= {*source.names}]
    return read[0](source) if read else None


def _processed(source: Source) -> Layout | None:
    inter, items = JsonLines(source, "interactions.jsonl"), JsonLines(source, "items.jsonl")
    if not {"user_id", "item_id"} <= {*inter.names} or "item_id" not in items.names:
        return None
    columns = {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "overall"}
    columns = {role: name for role, name in columns.items() if name in inter.names}
    roles = {"item": "item_id", "brand": "brand", "category": "categories", "description": "description"}
    named = {role: name for role, name in roles.items() if name in items.names}
    if "title" in items.names:
        return Layout("RecBole3.0", inter, columns, items, {**named, "title": "title"}, properties=_PRODUCTS)

    def texts(values: Texts) -> Texts:  # metadata_text: a sentence for each field, that of the title first
        found = _SENTENCE.match(values["title"] or "")
        return {**values, "title": found[1] if found else values["title"]}

    note = "titles are the first sentences of metadata_text; RecBole3.0's metadata_mode: fields writes whole titles"
    title = {"title": "metadata_text"} if "metadata_text" in items.names else {}
    notes = (note,) if title else (f"{items.shown} has neither title nor metadata_text, so items have no titles",)
    return Layout("RecBole3.0", inter, columns, items, {**named, **title}, texts if title else None, {}, _PRODUCTS, notes)


def _raw(source: Source) -> Layout | None:
    """Amazon reviews as RecBole3.0 stores them, under one name for all categories."""
    inter = JsonLines(source, "reviews.jsonl")
    of_2014 = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"}
    of_2023 = {"user": "user_id", "item": "parent_asin", "time": "timestamp", "rating": "rating"}
    columns = next((own for own in (of_2014, of_2023) if {*own.values()} <= {*inter.names}), None)
    if columns is None:
        return None
    items, names = JsonLines(source, "meta.jsonl"), {"brand": "brand", "category": "categories"}
    return Layout("RecBole3.0, Amazon reviews", inter, columns, items, metadata_columns(), metadata, names, _PRODUCTS)


def pairs(source: Source) -> Layout | None:
    """A ``.txt`` file with a user's and an item's number in each line, in the order of time."""
    if not (source.file or "").endswith((".txt", ".txt.gz")):
        return None
    name = str(source.file)
    with source.opened(name) as file:  # bytes, as a table of the user may be in any encoding
        first = [file.readline(1000).removeprefix(BOM_UTF8).split() for _ in range(100)]
    first = first[: first.index([])] if [] in first else first
    if not first or not all(len(cells) == 2 and b"".join(cells).isdigit() for cells in first):
        return None
    notes = ["items have no titles, so models that read titles cannot run"]
    texts = f"{Path(name.removesuffix('.gz')).stem}_meta.json.gz"
    if texts in source.names:
        notes = [
            f"{source.shown(texts)} is A-LLMRec's pickle of titles, which could execute code and is not read, so items have no "
            "titles; convert the Amazon reviews of 2018 that it was made of, with their metadata"
        ]
    inter = Plain(source, name, ("user", "item"), " ")
    return Layout("pairs of user and item", inter, {"user": "user", "item": "item"}, notes=notes)
