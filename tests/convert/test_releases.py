"""Releases are recognised by their files, and read in their exact layouts; the rows are made up."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.convert.conversion import Conversion, Options
from recbole_llm.convert.releases import recognised
from recbole_llm.convert.sources import ConversionError, Source


def folder(files: Mapping[str, str | bytes]) -> Path:
    """The files of a release; those that end in .gz are packed."""
    path = Path("release")
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        data = text.encode() if isinstance(text, str) else text
        (path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def lines(*rows: Any, literal: bool = False) -> str:
    return "".join(f"{row!r}\n" if literal else f"{json.dumps(row)}\n" for row in rows)


def converted(path: Path, **options: Any) -> tuple[str, list[str], list[str], dict[str, Any]]:
    """The name of the release, the lines of both files, and the properties."""
    conversion = Conversion(path, Options(to="mine", **options))
    conversion.plan()
    conversion.run()
    inter, items = ((conversion.folder / f"mine.{ending}") for ending in ("inter", "item"))
    texts = items.read_text().splitlines() if items.is_file() else []
    properties = yaml.safe_load((conversion.folder / "mine.yaml").read_text())
    return conversion.layout.name, inter.read_text().splitlines(), texts, properties


def test_the_encoding_of_a_release_is_known() -> None:
    path = folder({"u.data": "196\t2\t3\t881250949\n", "u.item": "2|A|||x|" + "|".join("0" * 19) + "\n"})
    with pytest.raises(
        ConversionError, match="--encoding=utf-16: release is recognised as .*; leave it out, or name the columns"
    ):
        Conversion(path, Options(to="mine", encoding="utf-16"))


def test_movielens_100k() -> None:
    flags = "|".join("1" if place in (3, 4, 5) else "0" for place in range(19))
    none = "|".join("0" * 19)
    items = f"1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/x|{flags}\n2|Misérables, Les (1995)|||x|{none}\n"
    items += f"267|unknown||||1|{none[2:]}\n"
    files = {"u.data": "196\t2\t3\t881250949\n186\t1\t3\t891717742\n186\t267\t1\t891717743\n", "u.item": items.encode("latin-1")}
    name, inter, texts, properties = converted(folder(files))
    assert name == "MovieLens 100K"
    assert inter == [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        *("196\t2\t3\t881250949", "186\t1\t3\t891717742", "186\t267\t1\t891717743"),
    ]
    assert texts == [
        "item_id:token\ttitle:token\tyear:token\tgenres:token_seq",
        *("1\tToy Story\t1995\tAnimation|Children's|Comedy", "2\tMisérables, Les\t1995\t", "267\t\t\t"),
    ]
    assert properties == {
        **{"title_field": "title", "year_field": "year", "category_field": "genres", "seq_separator": "|"},
        **{"article_suffix": True, "noun": "movie", "verb": "watched", "verb_base": "watch"},
    }


@pytest.mark.parametrize(("name", "more"), [("MovieLens 1M", "users.dat"), ("MovieLens 10M", "tags.dat")])
def test_movielens_1m_and_10m(name: str, more: str) -> None:
    encoding = "latin-1" if "1M" in name else "utf-8"
    movies = "1::Amélie (2001)::Comedy|Romance\n2::Star Wars: Episode IV (1977)::(no genres listed)\n".encode(encoding)
    files = {"ratings.dat": "1::2::5::978300760\n1::1::3.5::978302109\n", "movies.dat": movies, more: ""}
    found, inter, texts, _ = converted(folder(files))
    assert found == name and inter[1:] == ["1\t2\t5\t978300760", "1\t1\t3.5\t978302109"]
    assert texts[1:] == ["1\tAmélie\t2001\tComedy|Romance", "2\tStar Wars: Episode IV\t1977\t"]


def test_movielens_in_csv_within_its_archive() -> None:
    with zipfile.ZipFile("ml-latest.zip", "w") as archive:
        archive.writestr("ml-latest/ratings.csv", "userId,movieId,rating,timestamp\n1,7,4.0,1225734739\n1,8,2.0,1225734740\n")
        archive.writestr("ml-latest/movies.csv", 'movieId,title,genres\n8,"American President, The (1995)",Drama\n9,X,Y\n7,Y,Z\n')
        archive.writestr("__MACOSX/ratings.csv", "x")
    name, inter, texts, _ = converted(Path("ml-latest.zip"), min_rating=4)
    assert "25M" in name and inter[1:] == ["1\t7\t4\t1225734739"] and texts[1:] == ["7\tY\t\tZ"]


AMAZON_14 = {
    "reviewerID": "A1", "asin": "0001", "reviewerName": "J", "helpful": [2, 3], "reviewText": "t\n", "overall": 5.0,
    "summary": "s", "unixReviewTime": 1252800000, "reviewTime": "09 13, 2009",
}  # fmt: skip
META_14 = {
    "asin": "0001", "title": "Girls' Ballet &amp; Tutu", "price": 3.17, "imUrl": "u", "brand": "Coxlures",
    "categories": [["Sports", "Dance"], ["Sports", "Outdoors"]], "description": "This <b>is</b>",
    "related": {"also_bought": ["B1"]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["reviews_Toys_and_Games_5.json.gz", "reviews_Toys_and_Games.json.gz"])
def test_amazon_2014(name: str) -> None:
    path = folder({name: lines(AMAZON_14), "meta_Toys_and_Games.json.gz": lines(META_14, {"asin": "0002"}, literal=True)})
    release, inter, texts, properties = converted(path, description=True)
    assert release == "Amazon 2014" and inter[1:] == ["A1\t0001\t5\t1252800000"]
    assert texts == [
        "item_id:token\ttitle:token\tbrand:token\tcategories:token_seq\tdescription:token",
        *(["0001\tGirls' Ballet & Tutu\tCoxlures\tSports|Dance|Outdoors\tThis is"]),
    ]
    assert properties["noun"] == "product" and properties["description_field"] == "description"


def test_amazon_2014_ratings_have_no_header() -> None:
    path = folder({"ratings_Beauty.csv": "A1,0001,5.0,1369699200\n", "meta_Beauty.json.gz": lines(META_14, literal=True)})
    release, inter, texts, _ = converted(path / "ratings_Beauty.csv")
    assert release == "Amazon 2014, ratings" and inter[1:] == ["A1\t0001\t5\t1369699200"] and len(texts) == 2


def test_amazon_2018() -> None:
    review = {
        "overall": 4,
        "verified": True,
        "reviewTime": "11 30, 2015",
        "reviewerID": "A2",
        "asin": "B1",
        "style": {"Size:": "X"},
    }
    review |= {"reviewerName": "N", "reviewText": "t", "summary": "s", "unixReviewTime": 1448841600}
    meta = {"category": ["Luxury", "Skin"], "tech1": "", "description": ["a", "b"], "title": "Cream", "brand": "", "asin": "B1"}
    twice = {**meta, "title": "again"}
    path = folder({"Luxury_Beauty_5.json.gz": lines(review), "meta_Luxury_Beauty.json.gz": lines(meta, twice)})
    release, inter, texts, _ = converted(path)
    assert release == "Amazon 2018" and inter[1:] == ["A2\tB1\t4\t1448841600"]
    assert texts == ["item_id:token\ttitle:token\tcategories:token_seq", "B1\tCream\tLuxury|Skin"]


def test_amazon_2023() -> None:
    review = {"rating": 5.0, "title": "Love it!", "text": "t", "images": [], "asin": "B1", "parent_asin": "P1", "user_id": "U"}
    review |= {"timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True}
    meta = {"main_category": "All Beauty", "title": "Howard <b>LC0008</b>", "average_rating": 4.8, "features": [], "price": None}
    meta |= {
        "description": ["d"],
        "images": [],
        "store": "Howard",
        "categories": [],
        "details": {"Brand": "HP"},
        "parent_asin": "P1",
    }
    path = folder({"All_Beauty.jsonl.gz": lines(review), "meta_All_Beauty.jsonl.gz": lines(meta)})
    release, inter, texts, _ = converted(path / "All_Beauty.jsonl.gz")
    assert release == "Amazon 2023" and inter[1:] == ["U\tP1\t5\t1588687728.923"]
    assert texts == ["item_id:token\ttitle:token\tbrand:token\tcategories:token_seq", "P1\tHoward LC0008\tHP\tAll Beauty"]


def test_a_folder_with_several_categories_of_amazon_is_asked_about() -> None:
    files = {f"reviews_{one}_5.json.gz": lines(AMAZON_14) for one in ("Beauty", "Baby")} | {"meta_Baby.json.gz": lines(META_14)}
    with pytest.raises(ValueError, match=r"several files of reviews; give one of them: .*Baby.*Beauty"):
        Conversion(folder(files), Options(to="mine"))


def test_steam() -> None:
    review = {"username": "Chaos ", "hours": 0.1, "products": 41, "product_id": "725280", "page_order": 0, "date": "2017-12-17"}
    game = {
        "publisher": "K",
        "genres": ["Action", "Indie"],
        "app_name": "Lost &amp; Found",
        "title": "Lost &amp; Found",
        "url": "u",
    }
    game |= {"release_date": "2018-01-04", "tags": ["x"], "price": 4.99, "id": "725280", "developer": "Kotoshiro"}
    path = folder({"steam_reviews.json.gz": lines(review, literal=True), "steam_games.json.gz": lines(game, literal=True)})
    release, inter, texts, properties = converted(path)
    assert release == "Steam" and inter[1:] == ["Chaos\t725280\t1513468800"] and properties["verb"] == "played"
    assert texts == [
        "item_id:token\ttitle:token\tyear:token\tdeveloper:token\tgenres:token_seq",
        *(["725280\tLost & Found\t2018\tKotoshiro\tAction|Indie"]),
    ]


def test_yelp() -> None:
    review = {
        "review_id": "r",
        "user_id": "u",
        "business_id": "b",
        "stars": 3.0,
        "useful": 0,
        "text": "t",
        "date": "2018-07-07 22:09:11",
    }
    place = {"business_id": "b", "name": "Abby's", "city": "Reno", "stars": 5.0, "categories": "Doctors, Health & Medical"}
    files = {"yelp_academic_dataset_review.json": lines(review), "yelp_academic_dataset_business.json": lines(place)}
    release, inter, texts, _ = converted(folder(files))
    assert release == "Yelp" and inter[1:] == ["u\tb\t3\t1531001351"]
    assert texts == ["item_id:token\ttitle:token\tcity:token\tcategories:token_seq", "b\tAbby's\tReno\tDoctors|Health & Medical"]


def test_goodreads() -> None:
    row = {
        "user_id": "u",
        "book_id": "9",
        "review_id": "r",
        "is_read": True,
        "rating": 4,
        "date_added": "Sun Jul 30 07:44:10 -0700 2017",
    }
    book = {"isbn": "1", "title": "A Book (Series, #1)", "publication_year": "1999", "publisher": "P", "book_id": "9"}
    book |= {"popular_shelves": [{"count": "9", "name": "to-read"}, {"count": "3", "name": "poetry"}], "description": "d"}
    files = {
        "goodreads_interactions_poetry.json.gz": lines(row, {**row, "user_id": "v", "is_read": False}),
        "goodreads_books_poetry.json.gz": lines(book),
        "goodreads_books_comics.json.gz": lines(book),
    }
    release, inter, texts, _ = converted(folder(files))
    assert release == "Goodreads" and inter[1:] == ["u\t9\t4\t1501425850"]
    assert texts == [
        "item_id:token\ttitle:token\tyear:token\tpublisher:token\tshelves:token_seq",
        *(["9\tA Book (Series, #1)\t1999\tP\tpoetry"]),
    ]


def test_lastfm() -> None:
    files: dict[str, str | bytes] = {
        "user_artists.dat": "userID\tartistID\tweight\n2\t51\t13883\n2\t52\t11690\n",
        "artists.dat": "id\tname\turl\tpictureURL\n51\tDuran Duran\thttp://x\thttp://y\n52\tMorcheeba\thttp://x\t\n",
    }
    release, inter, texts, _ = converted(folder(files), out=Path("plays"))
    assert "HetRec" in release and inter[1:] == ["2\t51\t13883\t1", "2\t52\t11690\t2"]
    assert texts == ["item_id:token\ttitle:token", "51\tDuran Duran", "52\tMorcheeba"]
    files["tags.dat"] = "tagID\ttagValue\n1\tcafé\n2\tpop\n".encode("latin-1")
    tagged = "2\t52\t1\t1238536800000\n2\t52\t2\t1238536800000\n3\t52\t2\t1238536800000\n"
    files["user_taggedartists-timestamps.dat"] = f"userID\tartistID\ttagID\ttimestamp\n{tagged}"
    _, inter, texts, _ = converted(folder(files))
    assert inter[1:] == ["2\t52\t1238536800", "3\t52\t1238536800"]  # two tags are one interaction
    assert texts == ["item_id:token\ttitle:token\ttags:token_seq", "52\tMorcheeba\tpop|café"]


def test_mind() -> None:
    files = {
        "behaviors.tsv": "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-1 N4-0\n2\tU1\t11/10/2019 1:00:00 PM\tN1 N2\tN4-1\n"
        "3\tU2\t11/12/2019 9:00:00 AM\t\tN1-0 N4-0\n",
        "news.tsv": '"'.join(["N1\tsports\tgolf\tThe ", " Brand\tabs\turl\t[]\t[]\nN4\tnews\tworld\tPeace\t\tu\t[]\t[]\n"]),
    }
    release, inter, texts, _ = converted(folder(files))
    assert release == "MIND"
    assert inter[1:] == ["U1\tN1\t1573390798", "U1\tN2\t1573390799", "U1\tN3\t1573463158", "U1\tN4\t1573390800"]
    assert texts == [
        "item_id:token\ttitle:token\tsubcategory:token\tcategory:token_seq",
        *(['N1\tThe " Brand\tgolf\tsports', "N4\tPeace\tworld\tnews"]),
    ]


def test_literals_are_not_evaluated() -> None:
    hostile = "{'asin': __import__('os').system('touch hacked'), 'title': 'T'}\n"
    path = folder({"reviews_Baby_5.json.gz": lines(AMAZON_14), "meta_Baby.json.gz": hostile})
    with pytest.raises(ValueError, match=r"meta_Baby\.json\.gz, line 1: .*is not a JSON object"):
        Conversion(path, Options(to="mine"))
    deep = folder({"meta_Baby.json.gz": "{'a': " + "[" * 100_000})
    with pytest.raises(ValueError, match=r"line 1"):
        Conversion(deep, Options(to="mine"))
    assert not Path("hacked").exists()


def test_a_row_that_is_cut_off_is_named() -> None:
    path = folder({"ratings.dat": "1::2::5::978300760\n1::1\n", "movies.dat": "1::A::B\n", "users.dat": ""})
    conversion = Conversion(path, Options(to="mine"))
    with pytest.raises(ValueError, match=r"ratings\.dat, line 2: 2 cells, but this release has 4 \(user, item, rating, time\)"):
        conversion.run()
    assert not any(Path("dataset").glob("*"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("australian_user_reviews.json.gz", "take steam_reviews"),
        ("combined_data_1.txt", "Netflix"),
        ("yoochoose-clicks.dat", "YooChoose"),
        ("BX-Book-Ratings.csv", "Book-Crossing"),
        ("goodreads_interactions.csv", "neither times"),
        ("a.inter", "atomic file already"),
        ("a.sqlite3", "a database"),
    ],
)
def test_others_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recognised(Source(folder({name: "x"}) / name))


@pytest.mark.parametrize(
    ("items", "title"),
    [
        ([{"item_id": "B1", "title": "Glass. Of water", "brand": "Acme", "metadata_text": "x."}], "Glass. Of water"),
        ([{"item_id": "B1", "metadata_text": "Glass of water. 3.50. Acme."}], "Glass of water"),
        ([{"item_id": "B1", "metadata_text": "Glass of water"}], "Glass of water"),
    ],
)
def test_recbole3s_processed_folders(items: list[dict[str, Any]], title: str) -> None:
    inter = [{"user_id": "A", "item_id": "B1", "timestamp": 1400000000, "overall": 5.0, "label": None}]
    files = {"interactions.jsonl": lines(*inter), "items.jsonl": lines(*items), "users.jsonl": lines({"user_id": "A"})}
    name, inter_lines, texts, properties = converted(folder(files))
    assert (name, inter_lines[1]) == ("RecBole3.0", "A\tB1\t5\t1400000000")
    assert texts[1].split("\t")[:2] == ["B1", title] and properties["noun"] == "product"


@pytest.mark.parametrize(
    ("review", "item"),
    [
        (
            {"reviewerID": "A", "asin": "B1", "unixReviewTime": 1400000000, "overall": 5.0},
            {"asin": "B1", "categories": [["X", "Y"]]},
        ),
        (
            {"user_id": "A", "parent_asin": "B1", "timestamp": 1400000000000, "rating": 5.0},
            {"parent_asin": "B1", "store": "Acme"},
        ),
    ],
)
def test_recbole3s_raw_folders(review: dict[str, Any], item: dict[str, Any]) -> None:
    files = {"reviews.jsonl": lines(review), "meta.jsonl": lines({**item, "title": "Glass"})}
    name, inter, texts, _ = converted(folder(files))
    assert (name, inter[1]) == ("RecBole3.0, Amazon reviews", "A\tB1\t5\t1400000000")
    assert texts[1].startswith("B1\tGlass")


@pytest.mark.parametrize("beside", [{}, {"Movies_meta.json.gz": "a pickle"}])
def test_pairs_of_users_and_items_in_the_order_of_time(beside: dict[str, str]) -> None:
    path = folder({"Movies.txt": "1 7\n1 3\n2 3\n", **beside}) / "Movies.txt"
    found = recognised(Source(path))
    assert found is not None and ("pickle" in " ".join(found.notes)) == bool(beside)
    name, inter, texts, _ = converted(path)
    assert name == "pairs of user and item" and [line.split("\t")[:2] for line in inter[1:]] == [
        ["1", "7"],
        ["1", "3"],
        ["2", "3"],
    ]
    assert not texts


def test_a_text_file_of_other_numbers_is_a_table_of_the_user() -> None:
    assert recognised(Source(folder({"Movies.txt": "1 7\n1 3 5\n"}) / "Movies.txt")) is None
