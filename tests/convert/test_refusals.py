"""What is refused, with its remedy, and leaves nothing half written."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.convert.conversions import convert, refused, write, write_bytes


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("user,item,time\na,x,1\nb,,2\n", {}, ["a.csv: 1 of 2 rows have an empty cell (item: 1; the first is line 3)"]),
        ("user,item,time\na,x\n", {}, ["line 2: 2 cells, but the header has 3 (user, item, time)"]),
        ("user,item,time\na,x1,2020-01-01\nb,y1,soon\n", {"time_format": "%Y-%m-%d"}, ["line 3, column time", "'soon'"]),
        ("user,item,rating\na,x,5\nb,y,good\n", {}, ["line 3, column rating: 'good' is not a number"]),
        ("user,item,time\na,x,1700000000\nb,y,1700000001\nc,z,1700000000000\n", {}, ["line 4, column time", "one unit"]),
        ("user,item,time\na,x,01/02/2020\n", {}, ["column time", "--time_format"]),
        ("user,item\na,x\n", {"time_format": "%Y"}, ["--time_format=%Y", "no column is read as the time"]),
        ("user,item\na,x\n", {"item_columns": {"item": "id"}}, ["--item_columns", "'id'", "name it with --items"]),
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
        ("user,item\ra,x\rb,y\r", {}, ["a.csv, line 1", "carriage returns alone", "tr '\\r' '\\n'"]),
        ("1::31::5::978300760\n", {}, ["a.csv, line 1", "is one cell", "not by '::'", "sed 's/::/\\t/g'"]),
        ("1 31 5 978300760\n", {"columns": {"user": 1}}, ["not by ' '"]),
        ("user\na\n", {}, ["'user' is one cell", "is it the whole table?"]),
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
    nested = write("a.jsonl", '{"user": "a", "item": {"id": 1, "name": "X Y"}}\n')
    assert "line 1, column item: {'id': 1, 'name': 'X Y'} has several values; write the one that is the id" in refused(nested)
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
