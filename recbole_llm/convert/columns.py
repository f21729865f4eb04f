"""Which column is what: guessed by its name, or as the user says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from recbole_llm.convert.sources import ConversionError
from recbole_llm.convert.tables import Table

TEXTS = ("title", "year", "brand", "category", "description")
ROLES = ("user", "item", "time", "rating", *TEXTS)
"""What a column may be."""

# names without capitals, blanks and marks, the surest first
_NAMES: Mapping[str, str] = {
    "user": "userid user uid username reviewerid customerid customer visitorid memberid member accountid account listenerid "
    "listener readerid playerid personid sessionid session",
    "item": "itemid iid parentasin asin productid movieid bookid trackid songid gameid appid newsid articleid artistid "
    "businessid stockcode sku isbn itemcode productcode tmdbid imdbid trackuri uri videoid recipeid courseid",
    "time": "timestamp unixreviewtime time datetime date ts eventtime createdat playedat listenedat watchedat viewedat readat "
    "purchasedat orderedat invoicedate orderdate purchasedate reviewdate reviewtime dateadded playdate endtime when at",
    "rating": "rating ratings stars overall score rate grade vote",
    "title": "title itemtitle itemname movietitle tracktitle trackname songtitle songname booktitle productname producttitle "
    "gamename appname mastermetadatatrackname headline name description",
    "year": "year releaseyear publicationyear yearpublished released",
    "brand": "brand artist artistname author authors authorname director developer publisher store",
    "category": "category categories genre genres tags topic topics department",
    "description": "description summary abstract overview synopsis plot",
}
# an id, or a title: what the values look like decides
_THINGS = ("item", "product", "movie", "film", "song", "track", "book", "game", "article", "news", "artist", "recipe", "course")
_WORDS = {  # what a name contains: what prompts call an item, and what users do with it
    ("song", "track", "music"): ("song", "listened to", "listen to"),
    ("artist",): ("artist", "listened to", "listen to"),
    ("movie", "film"): ("movie", "watched", "watch"),
    ("book", "isbn"): ("book", "read", "read"),
    ("game", "appid"): ("game", "played", "play"),
    ("news", "article"): ("article", "read", "read"),
    ("recipe",): ("recipe", "cooked", "cook"),
    ("course",): ("course", "taken", "take"),
    ("product", "asin", "sku", "stockcode", "purchase", "invoice"): ("product", "bought", "buy"),
    ("restaurant", "business"): ("place", "visited", "visit"),
}


def guess(table: Table, roles: Collection[str], given: Mapping[str, Any], key: str) -> dict[str, str]:
    """The column of each role that the table has.

    Args:
        roles: those to look for.
        given: columns by role as the user says; None for a role without a column.
        key: the option that gives them, for messages.

    Raises:
        ConversionError: a role or a column that does not exist, or a column in two roles.
    """
    for role, name in given.items():
        if role not in ROLES:
            raise ConversionError(f"{key}: {role!r} is none of the roles {', '.join(ROLES)}")
        if name is not None and str(name) not in table.names:
            raise ConversionError(
                f"{key}: there is no column {name!r} in {table.shown}; its columns are {', '.join(table.names)}"
            )
    found = {role: str(name) for role, name in given.items() if name is not None and role in roles}
    twice = next((name for name in found.values() if [*found.values()].count(name) > 1), None)
    if twice is not None:
        raise ConversionError(f"{key}: column {twice!r} has two roles; give each role another column, or None")
    open_roles = [role for role in ROLES if role in roles and role not in given]
    for role in open_roles:
        if name := _by_name(_NAMES[role].split(), _free(table.names, found)):
            found[role] = name
    if "item" in open_roles and "item" not in found:
        _place_thing(table, found, title_open="title" in open_roles and "title" not in found)
    if "item" in open_roles and "item" not in found and "user" not in roles and (name := _by_name(("id",), table.names)):
        found["item"] = name  # in a table of items; elsewhere it counts the rows
    return {role: found[role] for role in ROLES if role in found}


def _place_thing(table: Table, found: dict[str, str], *, title_open: bool) -> None:
    """A column such as ``song``: an id if another column is the title or if its values have no blanks, else the title."""
    name = _by_name(_THINGS, _free(table.names, found))
    if name is None and "title" not in found and _plain(found.get("brand", "")) in _THINGS:
        name = found.pop("brand")  # artists are what users chose, as nothing else is
    if name is None:
        return
    values = {str(value): isinstance(value, str) for (value,) in table.sample([name]) if value is not None}
    titles = sum(is_text and " " in value.strip() for value, is_text in values.items()) >= 0.1 * max(len(values), 1)
    if titles and title_open:
        found["title"] = name
    else:
        found["item"] = name


def _free(names: Sequence[str], found: Mapping[str, str]) -> list[str]:
    return [name for name in names if name not in found.values()]


def _by_name(known: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of the known names."""
    plain = {_plain(name): name for name in reversed(names)}
    return next((plain[one] for one in known if one in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def words(names: Iterable[str]) -> dict[str, str]:
    """``noun``, ``verb`` and ``verb_base`` that the names of columns, files and datasets suggest; none if they suggest none."""
    for name in map(_plain, names):
        for parts, (noun, verb, base) in _WORDS.items():
            if any(part in name for part in parts):
                return {"noun": noun, "verb": verb, "verb_base": base}
    return {}


def column_name(name: str) -> str:
    """A name for a column of an atomic file."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_") or "text"
