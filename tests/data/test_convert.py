"""Tables of the user become a dataset: guessed columns, times, titles, filters, and what is refused."""

from __future__ import annotations

import gzip
import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recbole_llm import cli
from recbole_llm.config import LLMConfig
from recbole_llm.convert import columns, times, values
from recbole_llm.convert.conversion import Conversion, Options
from recbole_llm.convert.sources import Source
from recbole_llm.convert.tables import table
from recbole_llm.data.loading import create_dataset

SONGS = """user,song,artist,genre,played_at
u1,"Hello, Again",Ann &amp; Bo,Rock|Folk,2024-01-31 10:00:00
u2,Rain,Cy,Rock,2024-01-31T11:00:00
u1,Rain,Dee,,2024-02-01 00:00:00
u1,rain ,cy,Rock,2024-02-01 00:00:01
"""


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def convert(path: Path | str, **options: Any) -> dict[str, list[list[str]]]:
    """The files of the new dataset by their ending, as cells."""
    conversion = Conversion(Path(path), Options(to="mine", **options))
    conversion.plan()
    conversion.run()
    files = [file for file in conversion.folder.iterdir() if file.suffix in (".inter", ".item")]
    return {file.suffix: [line.split("\t") for line in file.read_text().splitlines()] for file in files}


def plan(path: Path | str, **options: Any) -> str:
    return "\n".join(Conversion(Path(path), Options(to="mine", **options)).plan())


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        convert(path, **options)
    left = sorted(file.name for file in Path("dataset").glob("*")) if Path("dataset").is_dir() else []
    assert left in ([], ["mine"] if "exists" in str(error.value) else []), "nothing half written"
    return str(error.value)


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


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "json", "parquet"])
def test_each_form_of_a_table_gives_the_same(ending: str) -> None:
    rows = [{"user_id": f"u{n % 3}", "item_id": n % 4, "timestamp": 1_700_000_000 + n, "rating": 3.5} for n in range(9)]
    path = Path(f"rows.{ending}")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "json" in ending:
        write(path.name, "\n".join(map(json.dumps, rows)))
    else:
        mark = "\t" if ending == "tsv" else ","
        write(path.name, "\n".join([mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]))
    found = convert(path)[".inter"]
    assert found[0] == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    assert found[1:] == [[row["user_id"], str(row["item_id"]), "3.5", str(row["timestamp"])] for row in rows]


def test_a_table_of_items_gives_the_texts() -> None:
    write("plays.csv", "uid,track_id,ts\na,7,1700000000123\nb,8,1700000001000\nb,9,1700000002000\n")
    write("tracks.csv", 'id,name,year,tags\n8,"A <b>B</b>\n&quot;C&quot;",1999,"x, y"\n8,again,2000,z\n7,D,,\n5,E,,\n')
    found = convert("plays.csv", items=Path("tracks.csv"))
    assert found[".item"][1:] == [["8", 'A B "C"', "1999", "x|y"], ["7", "D", "", ""]]
    assert found[".inter"][1][2] == "1700000000.123"


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


# -- times ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "said", "seconds"),
    [
        ([1_500_000_000], "Unix seconds", 1_500_000_000),
        (["1500000000123"], "Unix milliseconds", 1_500_000_000.123),
        (["1500000000123456"], "Unix microseconds", 1_500_000_000.123456),
        (["1500000000.5"], "Unix seconds", 1_500_000_000.5),
        (["12", "7"], "order", 12),
        (["20200131"], "year, month and day", 1_580_428_800),
        (["2020-01-31"], "one day are tied", 1_580_428_800),
        (["2020-01-31T01:00:00+01:00"], "ISO dates", 1_580_428_800),
        (["2020-01-31 00:00:00 UTC"], "UTC", 1_580_428_800),
        (["31/01/2020 00:00"], "%d/%m/%Y %H:%M", 1_580_428_800),
        (["01/31/2020"], "%m/%d/%Y", 1_580_428_800),
        (["Fri Jan 31 01:00:00 +0100 2020"], "%z", 1_580_428_800),
        ([datetime(2020, 1, 31, tzinfo=UTC)], "ISO dates", 1_580_428_800),
        ([None, "", "2020-01-31"], "ISO", 1_580_428_800),
    ],
)
def test_times_are_understood(samples: list[Any], said: str, seconds: float) -> None:
    found = times.understood(samples)
    assert said in found.said and found.read(next(value for value in samples if value)) == seconds


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (["01/02/2020"], "day or the month first; give --time_format='%d/%m/%Y' or '%m/%d/%Y'"),
        (["yesterday"], "neither a number nor a date"),
        ([None, ""], "no values"),
    ],
)
def test_times_that_mean_several_things_are_asked_about(samples: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        times.understood(samples)
    assert message in str(error.value)


def test_a_given_form_of_dates() -> None:
    write("a.csv", "user,item,time\na,x1,01/02/2020\n")
    assert convert("a.csv", time_format="%d/%m/%Y")[".inter"][1][2] == "1580515200"


# -- values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Rock &amp;amp; Roll", "Rock & Roll"),
        ("<i>A</i>\t\n B<br/>C", "A B C"),
        ("I <3 you, 2 > 1", "I <3 you, 2 > 1"),
        (["a ", None, "b"], "a b"),
        ("var aPageStart = (new Date()).getTime();", ""),
        (None, ""),
        (float("nan"), ""),
        ('"Heroes"', '"Heroes"'),
    ],
)
def test_titles_are_cleaned(raw: Any, expected: str) -> None:
    assert values.clean(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(7, "7"), (7.0, "7"), (" 007 ", "007"), ("a\u200bb", "a\\u200bb"), (None, ""), (float("nan"), ""), ("7.0", "7.0")],
)
def test_ids_are_texts(raw: Any, expected: str) -> None:
    assert values.identifier(raw) == expected


@pytest.mark.parametrize(
    ("raw", "separator", "expected"),
    [
        ([["A", "B"], ["A", "C|D"]], None, ["A", "B", "C/D"]),
        ("['A', 'B']", None, ["A", "B"]),
        ("A;B; A", ";", ["A", "B"]),
        ("Clothing, Shoes", None, ["Clothing, Shoes"]),
        (None, "|", []),
    ],
)
def test_values_of_a_category(raw: Any, separator: str | None, expected: list[str]) -> None:
    assert values.parts(raw, separator) == expected


# -- encodings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["utf-16", "utf-16-be with a mark", "utf-16-le", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("place", ["a.txt", "a.txt.gz", "a.zip"])
def test_texts_of_several_bytes_a_character(form: str, place: str) -> None:
    """Other characters have the bytes of a line feed, too. "Unicode text" of spreadsheets has a mark and needs no option."""
    text = "user\titem\ttitle\r\nZoë\tx1\t\u0a0a\u0a41\u0100\u010a ab\r\nb\tx2\t漢\r\n"
    data = b"\xfe\xff" + text.encode("utf-16-be") if "mark" in form else text.encode(form)
    if place.endswith(".zip"):
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("a.txt", data)
    else:
        write_bytes(place, gzip.compress(data) if place.endswith(".gz") else data)
    options = {"encoding": "utf-16"} if form == "utf-16-le" else {}
    found = convert(place, **options)
    assert found[".inter"][1:] == [["Zoë", "x1", "1"], ["b", "x2", "2"]]
    assert found[".item"][1:] == [["x1", "\u0a0a\u0a41\u0100\u010a ab"], ["x2", "漢"]]


def test_utf16_without_a_mark_or_cut_off_is_named() -> None:
    data = "user,item\na,xé\n".encode("utf-16-le")
    assert "--encoding=utf-16" in refused(write_bytes("a.csv", data))
    assert "a.csv, line 2: b" in (said := refused(write_bytes("a.csv", data[:-3]), encoding="utf-16")) and "utf-16" in said


def test_each_table_is_read_in_its_encoding() -> None:
    """``encoding`` is that of the tables that are not in UTF-8."""
    write_bytes("sales.csv", "user,item\nZoë,x1\nb,x2\n".encode("latin-1"))
    write("items.csv", "item,title\nx1,Café\nx2,Thé\n")
    shown = plan("sales.csv", items=Path("items.csv"), encoding="latin-1")
    assert "interactions, read as latin-1" in shown and "items.csv: items, read as utf-8" in shown
    found = convert("sales.csv", items=Path("items.csv"), encoding="latin-1")
    assert found[".inter"][1][0] == "Zoë" and found[".item"][1:] == [["x1", "Café"], ["x2", "Thé"]]
    assert "read as" not in plan(write("a.csv", "user,item\na,é\n"), out=Path("other"))
    write_bytes("late.csv", b"user,item\n" + b"a,\xc3\xa9\n" * 300_000 + b"a,\xe9\n")  # over a block of good UTF-8
    assert "read as latin-1" in plan("late.csv", out=Path("other"), encoding="latin-1")
    write_bytes("kana.csv", "user,item,title\na,x,かな\n".encode("iso2022_jp"))  # only bytes of ASCII
    assert convert("kana.csv", out=Path("other"), encoding="iso2022_jp")[".item"][1] == ["x", "かな"]


def test_a_line_that_is_no_text_is_named_once() -> None:
    message = refused(write_bytes("a.csv", b"user,item_id,time\nZo\xeb,x,2020-01-01\n"))
    assert message.startswith("a.csv, line 2: b'") and message.count("a.csv") == 1 and "column" not in message


# -- decimal commas and empty cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_decimal_commas_are_read_where_commas_separate_no_cells(mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["user;item;rating;time", "a;x1;3,5;1700000000,5", "b;x2;4;1700000001", "b;x1;,5;1700000002,25"]
    write("a.csv", "\n".join(rows).replace(";", mark))
    cli.main(["data", "convert", "a.csv", "--to=mine"])
    found = [line.split("\t")[2:] for line in Path("dataset/mine/mine.inter").read_text().splitlines()[1:]]
    assert found == [["3.5", "1700000000.5"], ["4", "1700000001"], ["0.5", "1700000002.25"]]
    assert "column rating: 2 values have a decimal comma; '3,5' is read as 3.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user;item;rating\na;x;3,5\nb;y;3.5\n", ["line 3, column rating: '3.5' has a decimal point, but '3,5' above a comma"]),
        ("user;item;rating\na;x;3.5\nb;y;2\nc;y;3,5\n", ["line 4, column rating: '3,5' has a decimal comma, but '3.5' above"]),
        ("user;item;rating\na;x;1.234,5\n", ["'1.234,5' is not a number"]),
        ('user,item,rating\na,x,"3,5"\n', ["'3,5' is not a number; write decimals with a point", "semicolons or tabs"]),
    ],
)
def test_decimal_commas_that_are_not_certain_are_refused(text: str, parts: list[str]) -> None:
    message = refused(write("a.csv", text))
    assert [part for part in parts if part not in message] == [], message


def test_dates_keep_their_commas_and_points() -> None:
    assert convert(write("a.csv", 'user;item;time\na;x1;"Jan 31, 2020"\n'))[".inter"][1][2] == "1580428800"
    assert convert(write("b.csv", "user;item;time\na;x1;31.01.2020\n"), out=Path("b"))[".inter"][1][2] == "1580428800"


GAPS = "user,item,title,rating,time\na,x1,T,5,1700000000\nb,x1,T,,1700000001\n,x2,U, ,1700000002\nb,x2,,3,\nb,x2,,3,1700000003\n"


def test_rows_with_an_empty_cell_are_counted_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write("a.csv", GAPS))
    assert message.startswith("a.csv: 3 of 5 rows have an empty cell (user: 1, time: 1, rating: 2; the first is line 3); ")
    assert message.endswith("or leave these rows out with --drop_incomplete")
    cli.main(["data", "convert", "a.csv", "--to=mine", "--drop_incomplete"])
    assert "--drop_incomplete removes 3 interactions (user: 1, time: 1, rating: 2)" in capsys.readouterr().out
    kept = [line.split("\t") for line in Path("dataset/mine/mine.inter").read_text().splitlines()[1:]]
    assert kept == [["a", "x1", "5", "1700000000"], ["b", "x2", "3", "1700000003"]]
    assert "--drop_incomplete removes 3" in Path("dataset/mine/mine.yaml").read_text()


def test_empty_titles_count_where_they_tell_items_apart() -> None:
    assert "(title: 1; the first is line 3)" in refused(write("a.csv", "user,title\na,T\nb,\n"))
    frame = pa.table({"user": ["a", "b"], "item": [1.0, float("nan")]})
    pq.write_table(frame, "b.parquet")
    assert "(item: 1; the first is line 2)" in refused("b.parquet")
    write("c.jsonl", '{"user": "a", "item": null}\n')
    assert "no interactions without an empty cell" in refused("c.jsonl", drop_incomplete=True)


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


# -- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("user,item,time\na,x,1\nb,,2\n", {}, ["a.csv: 1 of 2 rows have an empty cell (item: 1; the first is line 3)"]),
        ("user,item,time\na,x\n", {}, ["line 2: 2 cells, but the header has 3 (user, item, time)"]),
        ("user,item,time\na,x1,2020-01-01\nb,y1,soon\n", {"time_format": "%Y-%m-%d"}, ["line 3, column time", "'soon'"]),
        ("user,item,rating\na,x,5\nb,y,good\n", {}, ["line 3, column rating: 'good' is not a number"]),
        ("user,item,time\na,x,1700000000\nb,y,1700000001\nc,z,1700000000000\n", {}, ["line 4, column time", "one unit"]),
        ("user,item,time\na,x,01/02/2020\n", {}, ["column time", "--time_format"]),
        ("foo,item\na,x\n", {}, ["that of the users: foo, item", "--columns=\"{'user': 'foo'}\""]),
        ("user,foo\na,x\n", {}, ["that of the items: user, foo"]),
        ("user,item\na,x\n", {"columns": {"user": "nosuch"}}, ["no column 'nosuch'", "user, item"]),
        ("user,item\na,x\n", {"columns": {"users": "user"}}, ["'users' is none of the roles user, item"]),
        ("user,item\na,x\n", {"columns": {"user": "item", "item": "item"}}, ["'item' has two roles"]),
        ("user,item\na,x\n", {"min_rating": 3}, ["--min_rating", "no column of ratings"]),
        ("user,item\na,x\n", {"k_core": 2}, ["--k_core=2 removes every interaction"]),
        ("user,item\n", {}, ["has no interactions"]),
        ("", {}, ["line 1", "empty"]),
        ("a,b\na,a\n", {"columns": {"user": "a", "item": "b"}, "encoding": "nosuch"}, ["--encoding=nosuch"]),
        ("1,2,5\n3,4,5\n", {}, ["no names of columns", "{'user': 1"]),
        ("a,a\n1,2\n", {}, ["two columns are called 'a'"]),
        ('user,item\na,"x"y\n', {}, ["line 2", "quotation marks"]),
    ],
)
def test_what_is_refused(text: str, options: dict[str, Any], parts: list[str]) -> None:
    message = refused(write("a.csv", text), **options)
    assert [part for part in parts if part not in message] == [], message


def test_numbered_columns_of_a_table_without_a_header() -> None:
    found = convert(write("a.csv", "1,2,5\n3,4,5\n"), columns={"user": 1, "item": 2, "time": None})
    assert found[".inter"][1:] == [["1", "2", "1"], ["3", "4", "2"]]


def test_other_refusals() -> None:
    assert "does not exist" in refused("nosuch.csv")
    assert "is not text in utf-8" in refused(write_bytes("a.csv", b"user,item\na,\xff\n"))
    assert "line 2" in refused(write("a.jsonl", '{"user": "a", "item": "x"}\nnonsense\n'))
    assert "jq -c" in refused(write("a.json", '[{"user": "a", "item": "x"}]\n'))
    assert "was cut off" in refused(write_bytes("a.csv.gz", gzip.compress(b"user,item\n" * 9000)[:-20]))
    for name in ("a.xlsx", "B.XLS", "c.ods", "d.numbers"):
        for options in ({}, {"columns": {"user": "a"}}):
            assert "is a spreadsheet; save it as CSV" in refused(write(name, "x"), **options)
    assert "--items: a.xlsx is a spreadsheet" in refused(write("a.csv", "user,item\na,x\n"), items=Path("a.xlsx"))
    assert "is it a spreadsheet; save it as CSV" in refused(write_bytes("b.csv", b"PK\x03\x04\x14\x00"))
    assert ".parquet, also with .gz or in a .zip" in refused(write("a.log", "x"))
    assert "an archive" in refused(write("a.tar.gz", "x"))
    assert "none of its ids ('8', ...)" in refused(write("a.csv", "user,item\na,x\n"), items=write("b.csv", "item,title\n8,T\n"))
    convert(write("a.csv", "user,item\na,x\n"))
    assert "exists; remove it" in refused("a.csv")


def write_bytes(name: str, data: bytes) -> Path:
    Path(name).write_bytes(data)
    return Path(name)
