"""Item texts, read from RecBole's atomic ``.item`` file by the rules of :mod:`recbole_llm.data.atomic_files`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.data.atomic_files import AtomicFile, AtomicFormat
from recbole_llm.data.ids import check_ids, check_joined, report_repeated
from recbole_llm.store.files import fingerprint

logger = getLogger()

COLUMNS = ("year_field", "brand_field", "category_field", "description_field")  # besides the title; a dataset may lack them
_SPOILED = {  # what text of a web page, and bytes that were read in a wrong encoding, look like
    "HTML": r"&(?:#\d{1,6}|#x[\da-fA-F]{1,5}|[a-zA-Z]{2,8});|</?(?:a|b|br|em|font|i|li|p|span|strong)(?: [^<>]*)?/?>",
    "characters of a wrong encoding": "\u00c3[\u0080-\u00bf]|\u00e2\u20ac|\ufffd",
}
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")  # white space and control characters
# "Usual Suspects, The (1995)", "Promise, The (Versprechen, Das)": an article at the end of a title or of an alternative title
_ARTICLE = re.compile(r"(^|\((?:a\.k\.a\. )?)([^()]+?), (The|An?|L[aeo]s?|Les|L'|El|Il|Der|Die|Das|Det|Une?)(?=$|[):]| [(\[-])")


@dataclass(frozen=True)
class ItemTexts:
    """The texts of each item: lists by RecBole's internal item id, with ``""`` at entry 0.

    Attributes:
        titles: the clean title; for an item without title its other texts, or else ``item <id>``.
        names: the title as prompts show it; unique, since year, brand or id are added to equal titles.
        fields: every other column of the file by name, cleaned in the same way; ``""`` for a missing value.
        columns: the column of each of :data:`COLUMNS` that the dataset has.
        lines: internal ids in the order of the file.
        kinds: type of each column, as in the header of the file.
        separator: of the values in a ``token_seq``.
        untitled: number of items without a title of their own.
    """

    titles: list[str]
    names: list[str]
    fields: dict[str, list[str]]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lines: Sequence[int] = ()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: str = " "
    untitled: int = 0

    @classmethod
    def read(
        cls,
        file: AtomicFile,
        *,
        item_ids: Sequence[str],
        id_field: str,
        title_field: str,
        year_field: str | None = None,
        brand_field: str | None = None,
        category_field: str | None = None,
        description_field: str | None = None,
        article_suffix: bool = False,
        no_value: Iterable[str] = (),
    ) -> ItemTexts:
        """Read the texts of ``item_ids``, the item tokens by internal id (``item_ids[0]`` is the padding item).

        ``article_suffix`` moves articles to the front: "Usual Suspects, The" becomes "The Usual Suspects".
        ``no_value`` lists the words for a missing value in this file (``unknown``).

        Raises:
            ValueError: a named column is absent, or has another meaning already.
            AtomicFileError: the file is malformed, or its ids are not those of ``item_ids``.
        """
        wanted = {"title_field": title_field, "year_field": year_field, "brand_field": brand_field}
        wanted |= {"category_field": category_field, "description_field": description_field, "ITEM_ID_FIELD": id_field}
        columns, lines = _read_columns(file, wanted, id_field, item_ids, frozenset(no_value))
        kinds, separator = file.types, file.form.seq_separator
        separator = " " if _BLANK.fullmatch(separator) else separator  # as in the clean texts

        def shown(field: str | None) -> list[str]:
            return [_readable(text, field, kinds, separator) for text in columns[field]] if field else [""] * len(item_ids)

        raw_titles = shown(title_field)
        del columns[title_field]
        if article_suffix:
            raw_titles = [restore_article(title) for title in raw_titles]

        years, brands, categories = map(shown, (year_field, brand_field, category_field))
        untitled = raw_titles[1:].count("")
        if untitled:
            shown_path = os.path.normpath(file.path)  # RecBole's own data sets have ".." in theirs
            have = "has" if untitled == 1 else "have"
            logger.warning(f"{untitled} of {len(item_ids) - 1:,} items {have} no title in {shown_path}; other texts replace it")
        _warn_of_spoiled(raw_titles, title_field, file.path)
        others = zip(raw_titles, brands, categories, years, item_ids, strict=True)
        titles = [title or ", ".join(filter(None, texts)) or f"item {token}" for title, *texts, token in others]
        titles[0] = ""
        named = {key: name for key in COLUMNS if (name := wanted[key])}
        names = _unique(titles, years, brands, item_ids)
        return cls(titles, names, columns, named, lines, kinds, separator, untitled)

    def values(self, field: str) -> list[list[str]]:
        """The values of a column by item id: those of a ``token_seq`` between separators, or the text as one."""
        if self.kinds.get(field, "token_seq") != "token_seq":
            return [[text] if text else [] for text in self.fields[field]]
        return [_parts(text, self.separator) for text in self.fields[field]]

    def known(self, fields: Sequence[str]) -> list[dict[str, str]]:
        """The named columns that have a value, by item id.

        Raises:
            ValueError: a named column is absent.
        """
        for name in fields:
            if name not in self.fields:
                columns = ", ".join(self.fields) or "none"
                raise ValueError(f"text_fields: there is no column {name!r} besides the title; the columns are {columns}")
        return [
            {f: _readable(text, f, self.kinds, self.separator) for f in fields if (text := self.fields[f][item])}
            for item in range(len(self.titles))
        ]

    def described(self, fields: Sequence[str]) -> list[str]:
        """``name (brand: Kaytee, category: Hay)`` by item id: the name and the columns that are :meth:`known`."""
        texts = (", ".join(f"{f.replace('_', ' ')}: {text}" for f, text in known.items()) for known in self.known(fields))
        return [f"{name} ({text})" if text else name for name, text in zip(self.names, texts, strict=True)]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all texts."""
        form = [self.separator, dict(self.kinds)] if self.separator != " " else []
        return fingerprint([self.titles, self.names, self.fields, *form])


def chosen_columns(file: AtomicFile, config: Any) -> dict[str, Any]:
    """The column for ``title_field`` and each of :data:`COLUMNS`.

    Of a list it is the first that the file has, because versions of a dataset differ in headers. If it has none of them, there is
    no such column; of titles, the first name is returned. A ValueError: ``title_field`` is empty.
    """
    given = {key: config[key] for key in ("title_field", *COLUMNS)}
    if not given["title_field"]:
        raise ValueError(
            f"title_field: {given['title_field']!r} names no column of {file.path}; its columns are {', '.join(file.types)}"
        )
    if not any(isinstance(names, list | tuple) for names in given.values()):
        return given

    def first(names: Any) -> str | None:
        return next((name for name in names if name in file.types), None) if isinstance(names, list | tuple) else names

    found = {key: first(names) for key, names in given.items()}
    return found | {"title_field": found["title_field"] or given["title_field"][0]}


NO_ITEM_FILE = (
    "recbole-llm data convert --items=FILE writes one with the data; it has the columns item_id:token and title:token_seq"
)
"""The remedy where a model reads titles."""


def lacks_titles(config: Any) -> str | None:
    """The reason why the dataset of a configuration has no titles; None if it has some, or is not on disk yet."""
    folder, name = Path(config["data_path"]), config["dataset"]
    path = folder / f"{name}.item"
    if not any(folder.glob(f"{name}*.inter")):
        return None
    if not path.is_file():
        return f"title_field: the file of item texts, {path}, does not exist; {NO_ITEM_FILE}"
    try:
        file = AtomicFile(path, AtomicFormat.of(config))
        title = chosen_columns(file, config)["title_field"]
    except ValueError as error:
        return str(error)
    columns = ", ".join(file.types)
    return None if title in file.types else f"title_field: there is no column {title!r} in {path}; its columns are {columns}"


def refuse_given(config: Any, error: Exception) -> None:
    """Raise the error of a column of texts that is absent, if the user names it: no misspelt one shall change candidates."""
    if isinstance(error, ValueError) and config.external_config_dict.get(str(error).partition(":")[0]):
        raise error


def _warn_of_spoiled(titles: Sequence[str], field: str, path: Path) -> None:
    """Tell which titles are not as people write them; an LM reads them as they are."""
    for kind, pattern in _SPOILED.items():
        if found := [title for title in titles if re.search(pattern, title)]:
            logger.warning(
                f"{len(found)} of {len(titles) - 1} titles ({field} of {path}) contain {kind}, such as {found[0][:80]!r}; LMs "
                "read them as they are: make the file again with recbole-llm data convert, or correct it"
            )


def restore_article(title: str) -> str:
    """Move the article to the front: ``"Postino, Il (The Postman)"`` becomes ``"Il Postino (The Postman)"``."""

    def in_front(match: re.Match[str]) -> str:
        opening, noun, article = match.groups()
        return f"{opening}{article}{noun}" if article.endswith("'") else f"{opening}{article} {noun}"

    return _ARTICLE.sub(in_front, title)


def title_key(title: str) -> str:
    """The title without differences in case and spacing."""
    return " ".join(title.split()).casefold()


def _read_columns(
    file: AtomicFile, wanted: dict[str, str | None], id_field: str, item_ids: Sequence[str], no_value: frozenset[str]
) -> tuple[dict[str, list[str]], list[int]]:
    """Every column but the id as clean texts by internal id, and the internal ids in the order of the file.

    Of several rows of an item the first one counts, as in RecBole.
    """
    for key, name in wanted.items():
        if name and name not in file.types:
            raise ValueError(f"{key}: there is no column {name!r} in {file.path}; its columns are {', '.join(file.types)}")
    for key, meant in (("title_field", wanted["title_field"]), ("ITEM_ID_FIELD", id_field)):
        if other := next((other for other in COLUMNS if wanted[other] == meant), None):
            raise ValueError(f"{other}: {meant!r} is the column of {key} already; name another one, or give {other}: ~")
    columns = file.read([*file.types], as_text=True)
    ids = columns.pop(id_field)
    check_ids(file, id_field, {*ids})
    report_repeated(file, id_field, ids)
    row_of: dict[str, int] = {}
    for row, token in enumerate(ids):
        row_of.setdefault(token, row)
    check_joined(item_ids[1:], row_of, name=f"ITEM_ID_FIELD {id_field}", other=file.path)
    rows = [row_of.get(token) for token in item_ids[1:]]

    def clean(cell: str) -> str:
        return "" if cell in no_value else _BLANK.sub(" ", cell).strip()

    found = {name: ["", *("" if row is None else clean(cells[row]) for row in rows)] for name, cells in columns.items()}
    if wanted["title_field"] == id_field:  # a catalogue without titles
        found[id_field] = list(item_ids)
    return found, [item for _, item in sorted((row, item) for item, row in enumerate(rows, start=1) if row is not None)]


def _parts(text: str, separator: str) -> list[str]:
    return [part for part in (piece.strip() for piece in text.split(separator)) if part]


def _readable(text: str, field: str, kinds: Mapping[str, str], separator: str) -> str:
    """A clean cell as prompts show it: "Drama|Film Noir" becomes "Drama, Film Noir" if ``|`` separates the values of a column."""
    return text if separator == " " or kinds.get(field) != "token_seq" else ", ".join(_parts(text, separator))


def _unique(titles: Sequence[str], years: Sequence[str], brands: Sequence[str], item_ids: Sequence[str]) -> list[str]:
    names = list(titles)
    shared = _shared(names)
    if shared:
        logger.info(f"{len(shared)} items share their title with another one: prompts add year, brand or id")
    for texts in (years, brands):
        for item in shared:
            if texts[item] and texts[item] not in names[item]:
                names[item] += f" ({texts[item]})"
        shared = shared and _shared(names)
    while shared:  # repeats only if a title equals another one with its id
        for item in shared:
            names[item] += f" ({item_ids[item]})"
        shared = _shared(names)
    return names


def _shared(names: Sequence[str]) -> list[int]:
    """Items whose name another item has."""
    groups: dict[str, list[int]] = defaultdict(list)
    for item, name in enumerate(names[1:], start=1):
        groups[title_key(name)].append(item)
    return [item for items in groups.values() if len(items) > 1 for item in items]


def text_fields(config: Any, items: ItemTexts, *, described: bool = False) -> list[str]:
    """Columns of the .item file that are read besides the title: ``text_fields``, or year, brand and category.

    Args:
        described: read the description instead of these where the dataset has one.
    """
    if config["text_fields"] is not None:
        return config["text_fields"]
    if described and "description_field" in items.columns:
        return [items.columns["description_field"]]
    return [column for key, column in items.columns.items() if key != "description_field"]
