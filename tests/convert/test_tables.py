"""A table of the user becomes a dataset: guessed columns, titles, forms of a table, and filters."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recbole_llm import cli
from recbole_llm.config import LLMConfig
from recbole_llm.convert import columns
from recbole_llm.convert.sources import Source
from recbole_llm.convert.tables import table
from recbole_llm.data.loading import create_dataset
from tests.convert.conversions import SONGS, convert, write

# -- a table with titles -------------------------------------------------------------------------------------------------------


def test_songs_with_their_titles_make_both_files() -> None:
    found = convert(write("songs.csv", SONGS))
    assert found[".inter"] == [
        ["user_id:token", "item_id:token", "timestamp:float"],
        ["u1", "1", "1706695200"],
        ["u2", "2", "1706698800"],
        ["u1", "3", "1706745600"],
        ["u1", "2", "1706745601"],  # the same title and artist, however they are written
    ]
    assert found[".item"] == [
        ["item_id:token", "title:token", "artist:token", "genre:token_seq"],
        ["1", "Hello, Again", "Ann & Bo", "Rock|Folk"],
        ["2", "Rain", "Cy", "Rock"],
        ["3", "Rain", "Dee", ""],
    ]
    properties = yaml.safe_load(Path("dataset/mine/mine.yaml").read_text())
    assert properties == {
        "title_field": "title",
        "brand_field": "artist",
        "category_field": "genre",
        "seq_separator": "|",
        "noun": "song",
        "verb": "listened to",
        "verb_base": "listen to",
    }


def test_the_dataset_is_read_as_it_is_meant() -> None:
    convert(write("songs.csv", SONGS))
    config = LLMConfig("Pop", "mine", config_dict={"data_path": "dataset"})
    texts = create_dataset(config).item_texts
    assert texts.names[1:] == ["Hello, Again", "Rain (Cy)", "Rain (Dee)"]
    assert texts.values("genre")[1] == ["Rock", "Folk"] and config["verb_base"] == "listen to"


def test_the_command_shows_what_it_understands_before_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    write("songs.csv", SONGS)
    cli.main(["data", "convert", "songs.csv", "--to=mine", "--show"])
    out = capsys.readouterr().out
    assert "title        song" in out and "without a time zone, so taken as UTC" in out and "brand        artist" in out
    assert "category     genre (values between '|')" in out and not Path("dataset").exists()
    cli.main(["data", "convert", "songs.csv", "--to=mine", "--out=here", "--repeats=last"])
    out = capsys.readouterr().out
    assert "written to here/mine: 2 users, 3 items, 4 interactions" in out and Path("here/mine/mine.item").is_file()


def test_columns_that_are_given_replace_the_guess() -> None:
    write("plays.csv", "who,what,when,name\na,x 1,3,N\na,y 2,2,M\n")
    found = convert("plays.csv", columns={"user": "who", "item": "what", "time": None, "title": "name"})
    assert found[".inter"][1:] == [["a", "x 1", "1"], ["a", "y 2", "2"]]  # the order of the rows
    assert found[".item"][1:] == [["x 1", "N"], ["y 2", "M"]]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "json", "parquet", "csv.ZIP"])
def test_each_form_of_a_table_gives_the_same(ending: str) -> None:
    rows = [{"user_id": f"u{n % 3}", "item_id": n % 4, "timestamp": 1_700_000_000 + n, "rating": 3.5} for n in range(9)]
    path = Path(f"rows.{ending}")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "json" in ending:
        write(path.name, "\n".join(map(json.dumps, rows)))
    else:
        mark = "\t" if ending == "tsv" else ","
        text = "\n".join([mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)])
        if ending == "csv.ZIP":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("rows.csv", text)
        else:
            write(path.name, text)
    found = convert(path)[".inter"]
    assert found[0] == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    assert found[1:] == [[row["user_id"], str(row["item_id"]), "3.5", str(row["timestamp"])] for row in rows]


def test_a_table_of_items_gives_the_texts() -> None:
    write("plays.csv", "uid,track_id,ts\na,7,1700000000123\nb,8,1700000001000\nb,9,1700000002000\n")
    write("tracks.csv", 'id,name,year,tags\n8,"A <b>B</b>\n&quot;C&quot;",1999,"x, y"\n8,again,2000,z\n7,D,,\n5,E,,\n')
    found = convert("plays.csv", items=Path("tracks.csv"))
    assert found[".item"][1:] == [["8", 'A B "C"', "1999", "x|y"], ["7", "D", "", ""]]
    assert found[".inter"][1][2] == "1700000000.123"


def test_years_that_pandas_wrote_as_floats_are_years() -> None:
    found = convert(write("a.csv", "user,item,title,year\na,x,T,1999.0\na,y,U,\n"))
    assert found[".item"][1:] == [["x", "T", "1999"], ["y", "U", ""]]


def test_a_table_without_titles_has_no_item_file() -> None:
    assert [*convert(write("a.csv", "user,item,time\na,x1,1700000000\n"))] == [".inter"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("user_id,item_id,rating,timestamp", {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"}),
        ("userId,movieId,title,genres", {"user": "userId", "item": "movieId", "title": "title", "category": "genres"}),
        ("CustomerID,StockCode,Description,InvoiceDate", {"user": "CustomerID", "item": "StockCode", "time": "InvoiceDate"}),
        ("user_id,parent_asin,rating,timestamp,history", {"user": "user_id", "item": "parent_asin"}),
        ("User ID,Track Name,Artist Name,Time", {"user": "User ID", "title": "Track Name", "brand": "Artist Name"}),
        ("user,artist,time", {"user": "user", "item": "artist", "time": "time"}),
    ],
)
def test_columns_are_known_by_their_names(header: str, expected: dict[str, str]) -> None:
    path = write("a.csv", f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    found = columns.guess(table(Source(path), path.name), columns.ROLES, {}, "--columns")
    assert expected.items() <= found.items()


# -- filters -------------------------------------------------------------------------------------------------------------------

RATED = "user,item,rating,time\n" + "".join(
    f"{user},{item},{stars},{time}\n"
    for user, item, stars, time in [
        *(("a", "x1", 5, 1), ("a", "x1", 5, 1), ("a", "x1", 2, 3), ("a", "x2", 4, 4), ("b", "x1", 4, 5), ("b", "x2", 4, 6)),
        *(("c", "x3", 5, 7), ("c", "x3", 5, 8), ("b", "x3", 1, 9)),
    ]
)


def rows(**options: Any) -> list[str]:
    return ["".join([user, item[1:], time]) for user, item, _, time in convert(write("a.csv", RATED), **options)[".inter"][1:]]


def test_repeats() -> None:
    whole = ["a11", "a11", "a13", "a24", "b15", "b26", "c37", "c38", "b39"]
    assert rows(repeats="keep", out=Path("keep")) == whole
    assert rows(out=Path("exact")) == whole[1:]
    assert rows(repeats="first", out=Path("first")) == ["a11", "a24", "b15", "b26", "c37", "b39"]
    assert rows(repeats="last", out=Path("last")) == ["a13", "a24", "b15", "b26", "c38", "b39"]


def test_repeats_that_stay_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.csv", RATED)
    for options, told in ([], True), (["--repeats=first"], False):
        cli.main(["data", "convert", "a.csv", "--to=mine", f"--out=out{len(options)}", *options])
        assert ("2 interactions repeat an item of the same user" in capsys.readouterr().out) == told


def test_a_core_counts_different_partners_after_the_ratings() -> None:
    assert rows(min_rating=3, k_core=2) == ["a11", "a24", "b15", "b26"]
    assert "--k_core=2 removes 2 interactions" in Path("dataset/mine/mine.yaml").read_text()


def test_the_index_that_pandas_writes_is_a_column_without_a_name() -> None:
    found = convert(write("a.csv", ",user,song,timestamp\n0,ann,x,1\n1,bo,y,2\n2,ann,y,3\n"))
    assert [row[:2] for row in found[".inter"][1:]] == [["ann", "x"], ["bo", "y"], ["ann", "y"]]
