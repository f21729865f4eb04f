"""Texts in other encodings than UTF-8."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest

from tests.convert.conversions import convert, plan, refused, write, write_bytes


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
