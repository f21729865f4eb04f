"""The layouts that are known: releases as they are downloaded, recognised by their files; and tables of the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.convert.amazon import amazon
from recbole_llm.convert.columns import TEXTS, column_name, guess, words
from recbole_llm.convert.layout import Layout
from recbole_llm.convert.movielens import lastfm, movielens_100k, movielens_csv, movielens_dat
from recbole_llm.convert.research import pairs, recbole3
from recbole_llm.convert.reviews import goodreads, mind, steam, yelp
from recbole_llm.convert.sources import SPREADSHEET, SUFFIXES, ConversionError, Source
from recbole_llm.convert.tables import Delimited, Table, table

RELEASES: Sequence[Callable[[Source], Layout | None]] = (
    *(movielens_100k, movielens_dat, movielens_csv, lastfm, mind, yelp, steam, goodreads, recbole3, amazon, pairs),
)
# files of releases that are not read, and what to do
_REFUSED = {
    r"australian_user.*": "the reviews of Australian Steam users, nested by user; take steam_reviews.json.gz",
    r"combined_data_\d\.txt": "the Netflix Prize, which has no column of the movie; write it as CSV (user, movie, rating, date)",
    r"yoochoose-.*": "YooChoose, whose items have no titles; give yoochoose-clicks.dat as a CSV with a header",
    r"BX-Book.*": "Book-Crossing, which has no times; write the order you want as a column of times",
    r".*\.(inter|item)": "an atomic file already; put NAME.inter and NAME.item into a folder NAME (docs/data-files.md)",
    r"(?i).*\.(xls[xmb]?|ods|numbers)": SPREADSHEET,
    r".*\.(pkl|pickle|npz?|mat|h5)": "a binary file that is not read; write it as CSV or Parquet",
    r".*\.(db|sqlite3?)": "a database; write the query's result as CSV",
}


YOURS = "your table"
"""The name of the layout of tables of the user."""


def recognised(source: Source) -> Layout | None:
    """The release that a source is; None for tables of the user.

    Raises:
        ConversionError: a release that is known and not read.
    """
    if source.file:
        _refuse(source, [source.file])
    for read in RELEASES:
        if layout := read(source):
            return layout
    _refuse(source, source.names if source.file is None else ())
    return None


def _refuse(source: Source, names: Sequence[str]) -> None:
    for name in names:
        for pattern, reason in _REFUSED.items():
            if re.fullmatch(pattern, name):
                raise ConversionError(f"SOURCE: {source.shown(name)} is {reason}")


def of_user(
    source: Source, items: Path | None, columns: Mapping[str, Any], item_columns: Mapping[str, Any], encoding: str, to: str
) -> Layout:
    """Tables of the user, their columns guessed where they are not given.

    Raises:
        ConversionError: no table, or no column of users or of items; the message shows the columns.
    """
    inter = _several_columns(table(source, _only(source), encoding))
    if isinstance(inter, Delimited) and not inter.has_header and not columns:
        raise ConversionError(
            f"{inter.shown}, line 1: there are no names of columns; number them, as in "
            "--columns=\"{'user': 1, 'item': 2, 'rating': 3, 'time': 4}\""
        )
    separate = None if items is None else _items(items, encoding)
    roles = ("user", "item", "time", "rating", *(() if separate else TEXTS[:4]), *(TEXTS[4:] if "description" in columns else ()))
    found = guess(inter, roles, columns, "--columns")
    for role, others in (("user", ("user",)), ("item", ("item", "title"))):
        if not found.keys() & {*others}:
            raise ConversionError(
                f"{inter.shown}: none of its columns is known as that of the {role}s: {', '.join(inter.names)}; name it, as in "
                f"--columns=\"{{'{role}': '{inter.names[0]}'}}\""
            )
    item_found: dict[str, str] = {}
    if separate is not None:
        item_found = guess(separate, ("item", *TEXTS), item_columns, "--item_columns")
        for where, own, key in ((separate, item_found, "--item_columns"), (inter, found, "--columns")):
            if "item" not in own:
                raise ConversionError(
                    f"{where.shown}: no column is known as that of the items' ids: {', '.join(where.names)}; name it, as in "
                    f"{key}=\"{{'item': '{where.names[0]}'}}\""
                )
    texts = found if separate is None else item_found
    named = {role: column_name(name) for role, name in texts.items() if role in TEXTS and role != "title"}
    hints = [*(found[role] for role in ("item", "title") if role in found), *inter.names, source.path.name.partition(".")[0], to]
    return Layout(YOURS, inter, found, separate, item_found, None, named, words(hints))


def _items(path: Path, encoding: str) -> Table:
    source = Source(path, "--items")
    return _several_columns(table(source, _only(source, "--items"), encoding))


def _several_columns(found: Table) -> Table:
    """The table, unless other signs than those that are read separate its cells."""
    if not isinstance(found, Delimited) or len(found.names) > 1:
        return found
    sign = next((sign for sign in ("::", " ") if sign in found.first.strip()), None)
    how = f"write tabs for them: sed 's/{sign}/\\t/g'" if sign else "is it the whole table?"
    raise ConversionError(
        f"{found.shown}, line 1: {found.first.strip()[:80]!r} is one cell; cells are separated by tabs, commas, semicolons or "
        f"bars{f', and not by {sign!r}' if sign else ''}; {how}"
    )


def _only(source: Source, key: str = "SOURCE") -> str:
    """The file that the user gave, or the only table of a folder."""
    if source.file:
        return source.file
    found = [name for name in source.names if name.lower().removesuffix(".gz").endswith(SUFFIXES)]
    if len(found) != 1:
        raise ConversionError(
            f"{key}: {source.path} is no release that is known, and has {len(found)} tables ({', '.join(found) or 'none'}); give "
            "the file of interactions, and that of the items as --items"
        )
    return found[0]
