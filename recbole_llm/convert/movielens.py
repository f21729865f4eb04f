"""GroupLens' releases: MovieLens 100K, 1M, 10M and those in CSV (20M, 25M, 32M, latest), and HetRec 2011's Last.fm."""

from __future__ import annotations

import re
from collections import Counter

from recbole_llm.convert.layout import Layout, Texts
from recbole_llm.convert.sources import Source
from recbole_llm.convert.tables import Delimited, Plain, Table

_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_YEAR = re.compile(r"^(.*\S)\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
_MOVIES = {"article_suffix": True, "noun": "movie", "verb": "watched", "verb_base": "watch"}
_RATED = ("user", "item", "rating", "time")
_ROLES = {role: role for role in _RATED}
_TAGS = 5  # of an artist, the most frequent ones


def movielens_100k(source: Source) -> Layout | None:
    if not {"u.data", "u.item"} <= {*source.names} or source.file not in (None, "u.data"):
        return None
    columns = ["item", "title", "released", "video", "imdb", *_GENRES]
    items = Plain(source, "u.item", columns, "|", "latin-1")

    def texts(values: Texts) -> Texts:
        genres = [genre for genre in _GENRES[1:] if values.pop(genre) == "1"]
        return {**_titled(values), "category": genres}

    roles = {"item": "item", "title": "title", **{genre: genre for genre in _GENRES}}
    inter = Plain(source, "u.data", _RATED, "\t", "latin-1")
    return Layout("MovieLens 100K", inter, _ROLES, items, roles, texts, {"category": "genres"}, _MOVIES)


def movielens_dat(source: Source) -> Layout | None:
    """1M in latin-1, 10M in UTF-8."""
    if not {"ratings.dat", "movies.dat"} <= {*source.names} or source.file not in (None, "ratings.dat"):
        return None
    large = "tags.dat" in source.names or "users.dat" not in source.names
    encoding = "utf-8" if large else "latin-1"
    inter = Plain(source, "ratings.dat", _RATED, "::", encoding)
    items = Plain(source, "movies.dat", ("item", "title", "category"), "::", encoding)
    roles = {"item": "item", "title": "title", "category": "category"}
    name = f"MovieLens {'10M' if large else '1M'}"
    return Layout(name, inter, _ROLES, items, roles, _genres, {"category": "genres"}, _MOVIES)


def movielens_csv(source: Source) -> Layout | None:
    """20M, 25M, 32M and latest, which have the same files."""
    if not {"ratings.csv", "movies.csv"} <= {*source.names} or source.file not in (None, "ratings.csv"):
        return None
    inter, items = (Delimited(source, name, "utf-8", separator=",") for name in ("ratings.csv", "movies.csv"))
    if inter.names != ["userId", "movieId", "rating", "timestamp"] or items.names != ["movieId", "title", "genres"]:
        return None
    columns = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    roles = {"item": "movieId", "title": "title", "category": "genres"}
    return Layout("MovieLens (20M, 25M, 32M or latest)", inter, columns, items, roles, _genres, {"category": "genres"}, _MOVIES)


def _genres(values: Texts) -> Texts:
    genres = values.get("category") or ""
    return {**_titled(values), "category": [] if genres == "(no genres listed)" else genres.split("|")}


def _titled(values: Texts) -> Texts:
    """Title and year: "Toy Story (1995)"; "Toy Story" alone has no year."""
    title = values.get("title") or ""
    if title == "unknown":  # item 267 of MovieLens 100K
        return {**values, "title": ""}
    found = _YEAR.match(title)
    return {**values, "title": found[1], "year": found[2]} if found else values


def lastfm(source: Source) -> Layout | None:
    """HetRec 2011: artists that users listened to, or, where the times are at hand, those that they tagged."""
    if not {"user_artists.dat", "artists.dat"} <= {*source.names} or source.file not in (None, "user_artists.dat"):
        return None
    tagged, counts = "user_taggedartists-timestamps.dat", None
    names = ("id", "name", "url", "pictureURL")
    if {tagged, "tags.dat"} <= {*source.names}:
        counts = _tags(source, tagged)
    items = Plain(source, "artists.dat", names, "\t", header=True)

    def texts(values: Texts) -> Texts:
        return {**values, "category": counts.get(str(values["item"]), [])} if counts else values

    roles = {"item": "id", "title": "name"}
    properties = {"noun": "artist", "verb": "listened to", "verb_base": "listen to"}
    if counts and source.file is None:
        inter: Table = Plain(source, tagged, ("userID", "artistID", "tagID", "timestamp"), "\t", header=True)
        columns = {"user": "userID", "item": "artistID", "time": "timestamp"}
        note = f"interactions are the artists that users tagged ({tagged}), which have times; give user_artists.dat for plays"
    else:
        inter = Plain(source, "user_artists.dat", ("userID", "artistID", "weight"), "\t", header=True)
        columns = {"user": "userID", "item": "artistID", "rating": "weight"}
        note = "plays have no times: the order of a user's artists is that of the file, by number of plays (column rating)"
    return Layout("Last.fm (HetRec 2011)", inter, columns, items, roles, texts, {"category": "tags"}, properties, (note,))


def _tags(source: Source, tagged: str) -> dict[str, list[str]]:
    """The most frequent tags of each artist."""
    names = {
        str(key): value
        for _, (key, value) in Plain(source, "tags.dat", ("id", "tag"), "\t", "latin-1", header=True).rows(["id", "tag"])
    }
    table = Plain(source, tagged, ("userID", "artistID", "tagID", "timestamp"), "\t", header=True)
    found: dict[str, Counter[str]] = {}
    for _, (artist, tag) in table.rows(["artistID", "tagID"]):
        found.setdefault(str(artist), Counter())[str(tag)] += 1
    return {artist: [names.get(tag, "") for tag, _ in own.most_common(_TAGS)] for artist, own in found.items()}
