"""Releases of reviews and clicks: Steam, Yelp, Goodreads, MIND."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from recbole_llm.convert.layout import Layout, Texts
from recbole_llm.convert.sources import ConversionError, Source
from recbole_llm.convert.tables import JsonLines, Plain, Table

_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"
# shelves that say what a reader has or plans, not what a book is about
_NO_GENRE = re.compile(r"read|own|favou?rite|wish|library|kindle|default|shelf|book|my-|to-buy|audio|finish|dnf|\d")
_NEWS = ("newsid", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
_BEHAVIORS = ("impression", "user", "time", "history", "impressions")


def steam(source: Source) -> Layout | None:
    """The reviews of 2018 (``steam_reviews.json.gz``), whose lines are Python literals, and the games."""
    reviews = _named(source, "steam_reviews", "steam_new")
    if not reviews:
        return None
    inter = JsonLines(source, reviews, literal=True)
    if not {"username", "product_id", "date"} <= {*inter.names}:
        return None
    columns = {"user": "username", "item": "product_id", "time": "date"}
    properties = {"noun": "game", "verb": "played", "verb_base": "play"}
    games = next((name for name in source.names if re.fullmatch(r"steam_games\.json(\.gz)?", name)), None)
    if not games:
        note = f"there is no steam_games.json.gz beside {inter.shown}, so items have no titles"
        return Layout("Steam", inter, columns, properties=properties, notes=(note,))

    def texts(values: Texts) -> Texts:
        own = {**values, "title": values["title"] or values["app_name"]}
        return {**own, "category": values["genres"] or values["tags"], "year": (values["release_date"] or "")[:4]}

    items = JsonLines(source, games, literal=True)
    roles = {"item": "id", "brand": "developer", **{key: key for key in ("title", "app_name", "genres", "tags", "release_date")}}
    names = {"brand": "developer", "category": "genres"}
    note = "users are told apart by their names (username), as there is no id in every review"
    return Layout("Steam", inter, columns, items, roles, texts, names, properties, (note,))


def yelp(source: Source) -> Layout | None:
    names = {part: f"yelp_academic_dataset_{part}.json" for part in ("review", "business")}
    if names["review"] not in source.names or source.file not in (None, names["review"]):
        return None
    inter = JsonLines(source, names["review"])
    columns = {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"}
    properties = {"noun": "place", "verb": "visited", "verb_base": "visit"}
    if names["business"] not in source.names:
        note = f"there is no {names['business']} beside {inter.shown}, so items have no titles"
        return Layout("Yelp", inter, columns, properties=properties, notes=(note,))

    def texts(values: Texts) -> Texts:
        return {**values, "category": (values["category"] or "").split(", ")}

    roles = {"item": "business_id", "title": "name", "brand": "city", "category": "categories"}
    items = JsonLines(source, names["business"])
    return Layout("Yelp", inter, columns, items, roles, texts, {"brand": "city", "category": "categories"}, properties)


def goodreads(source: Source) -> Layout | None:
    """Interactions or reviews of a genre or of all, with the books of the same; their authors have numbers alone."""
    file = _named(source, "goodreads_interactions", "goodreads_reviews")
    if not file:
        return None
    if ".csv" in file:
        raise ConversionError(
            f"{source.shown(file)}: this table of Goodreads has neither times nor the ids of the books; give "
            "goodreads_interactions_GENRE.json.gz or goodreads_reviews_GENRE.json.gz"
        )
    inter = JsonLines(source, file)
    columns = {"user": "user_id", "item": "book_id", "rating": "rating", "time": "date_added"}
    properties = {"noun": "book", "verb": "read", "verb_base": "read"}
    read = "is_read" in inter.names
    keeps = {"keeps": _is_true, "also": ["is_read"]} if read else {}
    notes = ["books that a user has put on a shelf and not read (is_read) are left out"] if read else []
    genre = re.sub(r"^goodreads_(interactions|reviews)(_dedup|_spoiler)?|\.json(\.gz)?$", "", file)
    books = [name for name in source.names if re.fullmatch(r"goodreads_books.*\.json(\.gz)?", name)]
    books = [name for name in books if genre and f"books{genre}." in name] or books
    if len(books) != 1:
        notes.append(
            f"{'no' if not books else 'more than one'} goodreads_books file is beside {inter.shown}, so items have no titles"
        )
        return Layout("Goodreads", inter, columns, properties=properties, notes=notes, time_format=None, **keeps)  # type: ignore[arg-type]

    def texts(values: Texts) -> Texts:
        shelves = [str(shelf["name"]) for shelf in values["category"] or [] if isinstance(shelf, dict) and shelf.get("name")]
        return {**values, "category": [name for name in shelves if not _NO_GENRE.search(name)][:5]}

    roles = {"item": "book_id", "title": "title", "year": "publication_year", "brand": "publisher"}
    roles |= {"category": "popular_shelves", "description": "description"}
    shown = {"brand": "publisher", "category": "shelves"}
    items = JsonLines(source, books[0])
    return Layout("Goodreads", inter, columns, items, roles, texts, shown, properties, notes, **keeps)  # type: ignore[arg-type]


def _is_true(values: Sequence[Any]) -> bool:
    return values[0] in (True, "true", "True", 1)


def mind(source: Source) -> Layout | None:
    """Microsoft News: the history and the clicks of each user."""
    if "behaviors.tsv" not in source.names or source.file not in (None, "behaviors.tsv"):
        return None
    inter = _Clicks(Plain(source, "behaviors.tsv", _BEHAVIORS, "\t"))
    columns = {"user": "user", "item": "item", "time": "time"}
    properties = {"noun": "article", "verb": "read", "verb_base": "read"}
    note = (
        "interactions are the clicked articles, and before them the user's history, whose times the release does not have: its "
        "articles are written one second apart before the user's first impression"
    )
    if "news.tsv" not in source.names:
        return Layout(
            "MIND", inter, columns, properties=properties, notes=(note, "there is no news.tsv, so items have no titles")
        )
    items = Plain(source, "news.tsv", _NEWS, "\t")
    roles = {"item": "newsid", "title": "title", "category": "category", "brand": "subcategory", "description": "abstract"}
    names = {"brand": "subcategory", "description": "abstract"}
    return Layout("MIND", inter, columns, items, roles, None, names, properties, (note,))


class _Clicks(Table):
    """``behaviors.tsv`` as one row for each click and for each article of a user's history."""

    def __init__(self, behaviors: Plain) -> None:
        self._behaviors, self.shown, self.names = behaviors, behaviors.shown, ["user", "item", "time"]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        first: dict[str, datetime] = {}
        for number, (user, text) in self._behaviors.rows(["user", "time"]):
            time = self._time(number, text)
            first[user] = min(time, first.get(user, time))
        seen = set()
        for number, (user, text, history, impressions) in self._behaviors.rows(["user", "time", "history", "impressions"]):
            found = [] if user in seen else (history or "").split()
            seen.add(user)
            rows = [
                (item, first[user] - timedelta(seconds=back)) for item, back in zip(found, range(len(found), 0, -1), strict=True)
            ]
            shown = (one.rpartition("-") for one in (impressions or "").split())
            rows += [(item, self._time(number, text)) for item, _, clicked in shown if clicked == "1"]
            for item, time in rows:
                values = {"user": user, "item": item, "time": time}
                yield number, [values[name] for name in names]

    def _time(self, number: int, text: Any) -> datetime:
        try:
            return datetime.strptime(text or "", _MIND_TIME)
        except ValueError:
            raise ConversionError(
                f"{self.shown}, line {number}, column time: {text!r} is not of the form 11/15/2019 8:55:22 AM; is the file whole?"
            ) from None


def _named(source: Source, *starts: str) -> str | None:
    """The file that the user gave, or the only one of a folder, whose name starts like this."""
    given = [source.file] if source.file else source.names
    found = [name for name in given if name.startswith(starts) and (".json" in name or ".csv" in name)]
    if len(found) > 1:
        raise ConversionError(f"SOURCE: {source.path} has several files of interactions; give one: {', '.join(found)}")
    return found[0] if found else None
