"""Times, titles, ids, categories, decimal commas and empty cells."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recbole_llm import cli
from recbole_llm.convert import times, values
from recbole_llm.convert.conversion import Conversion, Options
from tests.convert.conversions import convert, plan, refused, write

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
        ("""['Fantasy', "Children's"]""", None, ["Fantasy", "Children's"]),  # a list of Python
        ("""['Drama' "Children's"\n 'Film Noir']""", None, ["Drama", "Children's", "Film Noir"]),  # an array of numpy
        ("[{'id': 16, 'name': 'Animation'}, {'id': 35, 'name': 'Comedy'}]", None, ["Animation", "Comedy"]),
        ("[REC]", None, ["[REC]"]),
    ],
)
def test_values_of_a_category(raw: Any, separator: str | None, expected: list[str]) -> None:
    assert values.parts(raw, separator) == expected


def test_several_authors_in_a_cell() -> None:
    write("a.csv", 'user,item,title,author\na,x1,Emma,"[\'Jane Austen\', ""Bob O\'Neil""]"\nb,x2,Persuasion,Jane Austen\n')
    assert [row[2] for row in convert("a.csv")[".item"][1:]] == ["Jane Austen, Bob O'Neil", "Jane Austen"]
    write("b.jsonl", '{"user": "a", "item": "x", "title": "Emma", "author": [{"id": 1, "name": "Ann"}, {"name": "Bo"}]}\n')
    conversion = Conversion(Path("b.jsonl"), Options(to="other"))
    conversion.run()
    assert Path("dataset/other/other.item").read_text().splitlines()[1] == "x\tEmma\tAnn, Bo"


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


def test_times_between_which_there_is_little_keep_their_order() -> None:
    cells = [".12345611", ".12345614", ".12345613", ".12345612"]
    rows = "".join(f"u,i{place},{time}\n" for place, time in enumerate(cells))
    found = convert(write("a.csv", "user,item,timestamp\n" + rows))[".inter"][1:]
    assert {item: float(time) for _, item, time in found} == {f"i{place}": float(time) for place, time in enumerate(cells)}


def test_half_of_a_character_is_dropped() -> None:
    assert values.clean("Good \ud83d") == "Good"


def test_columns_may_lack_the_quotes_that_a_shell_removes() -> None:
    write("a.csv", "who,what thing,when\na,x1,7\nb,x2,8\n")
    cli.main(["data", "convert", "a.csv", "--to=mine", "--columns={user:who, item: what thing, time:None}"])
    assert Path("dataset/mine/mine.inter").read_text().splitlines()[1:] == ["a\tx1\t1", "b\tx2\t2"]


def test_columns_that_are_not_read_are_shown() -> None:
    """They may say that a row is no interaction."""
    table = write("a.csv", "user,item,clicked,price\na,x1,true,3\nb,x2,false,4\n")
    assert "  not read     clicked, price\n" in plan(table) and "not read" not in plan(write("b.csv", "user,item\na,x1\n"))
