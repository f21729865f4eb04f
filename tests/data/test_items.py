from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat
from recbole_llm.data.items import COLUMNS, ItemTexts, chosen_columns, restore_article, text_fields

HEADER = "item_id:token\ttitle:token_seq\tyear:token\tbrand:token\tgenre:token_seq"
FIELDS = {"year_field": "year", "brand_field": "brand", "category_field": "genre"}


def read(folder: Path, lines: list[str], header: str = HEADER, **options: object) -> ItemTexts:
    path = folder / "toy.item"
    padded = [padded_line(line, header.count("\t")) for line in lines]
    path.write_text("\n".join([header, *padded, ""]), encoding="utf-8", newline="\n")
    tokens = list(dict.fromkeys(line.split("\t")[0] for line in lines if line))
    arguments = {"item_ids": ["[PAD]", *tokens], "id_field": "item_id", "title_field": "title", **FIELDS, **options}
    return ItemTexts.read(AtomicFile(path, AtomicFormat()), **arguments)  # type: ignore[arg-type]


def padded_line(line: str, tabs: int) -> str:
    """The line with empty cells at its end, as many as the header has, before a carriage return."""
    end = "\r" if line.endswith("\r") else ""
    return line.removesuffix("\r") + "\t" * (tabs - line.count("\t") if line else 0) + end


def test_titles_that_recboles_reader_loses(tmp_path: Path) -> None:
    titles = ['"Unbalanced', '"Weird Al" Yankovic', "NA", "nan", "null", "None", "1984", "x" * 200_000]
    items = read(tmp_path, [f"i{place}\t{title}\t1999\t\tDrama" for place, title in enumerate(titles)])
    assert items.titles == ["", *titles]
    assert items.fields["year"] == ["", *["1999"] * len(titles)]
    assert set(items.fields) == {"year", "brand", "genre"}


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Salt &amp; Pepper", "HTML"),
        ("R&#233;sum&eacute;", "HTML"),
        ("A <b>bold</b> title", "HTML"),
        ("AmÃ©lie", "characters of a wrong encoding"),
        ("Donâ€™t Look Now", "characters of a wrong encoding"),
        ("Am\ufffdlie", "characters of a wrong encoding"),
    ],
)
def test_titles_that_nobody_wrote_so_are_told(title: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, ["a\tAlien", f"b\t{title}", "c\tSalt & Pepper; <3 (Amélie, À bientôt, naïve, 10 < x > 5)"])
    (message,) = [one for one in caplog.messages if "titles (" in one]
    assert message.startswith(f"1 of 3 titles (title of {tmp_path / 'toy.item'}) contain {kind}, such as {title!r}; LMs read")


def test_order_is_that_of_the_internal_ids(tmp_path: Path) -> None:
    items = read(tmp_path, ["a\tAlien", "b\tBrazil", "c\tCube"], item_ids=["[PAD]", "c", "a", "not in the file"])
    assert items.titles == ["", "Cube", "Alien", "item not in the file"]


def test_first_line_of_an_item_counts(tmp_path: Path) -> None:
    assert read(tmp_path, ["a\tAlien", "a\tAliens"]).titles == ["", "Alien"]


def test_windows_line_ends_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    items = read(
        tmp_path,
        ["a\tAlien\t1979\t\tHorror\r", "", "b\tBrazil\r", "c\tn/a\r"],
        no_value=["n/a"],
        header=f"\ufeff{HEADER}\r",
    )
    assert items.titles == ["", "Alien", "Brazil", "item c"]
    assert items.fields["genre"] == ["", "Horror", "", ""]


def test_white_space_and_control_characters_become_one_space(tmp_path: Path) -> None:
    assert read(tmp_path, ["a\t Toy\x00\x1b \u2028\r Story\u00a0 \x07"]).titles == ["", "Toy Story"]


def test_items_without_a_title(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a\t\t1999\tOPI\tNail polish", "b\t \t\t\tNail polish", "c", "d\tDune", "e\tunknown\tunknown"]
    items = read(tmp_path, lines, no_value=["unknown"])
    assert items.titles == ["", "OPI, Nail polish, 1999", "Nail polish", "item c", "Dune", "item e"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith("4 of 5 items have no title")
    read(tmp_path, ["a", "b\tDune"])
    assert "1 of 2 items has no title" in caplog.text


def test_duplicate_titles_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        "1\tCape Fear\t1962",
        "2\tCape Fear\t1991",
        "3\tHeat\t1995\tWarner",
        "4\tHeat\t1995\tRegency",
        "5\tSoap",
        "6\tsoap",
        "7\tSolo\t2018",
        "8\tDawn (2002)\t2002",
        "9\tDawn (2002)\t2002",
    ]
    with caplog.at_level(logging.INFO):
        items = read(tmp_path, lines)
    assert items.names[1:] == [
        "Cape Fear (1962)",
        "Cape Fear (1991)",
        "Heat (1995) (Warner)",
        "Heat (1995) (Regency)",
        "Soap (5)",
        "soap (6)",
        "Solo",
        "Dawn (2002) (8)",
        "Dawn (2002) (9)",
    ]
    assert items.titles[1] == items.titles[2] == "Cape Fear"
    assert [record.getMessage()[:21] for record in caplog.records] == ["8 items share their t"]


def test_names_are_unique_even_against_titles_that_look_told_apart(tmp_path: Path) -> None:
    names = read(tmp_path, ["7\tA", "8\tA", "9\tA (7)", "10\tA (7) (7)", "11\tA (7) (9)"]).names
    assert len(set(names)) == len(names)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(titles=st.lists(st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"])), min_size=1))
def test_any_title_keeps_to_its_line(tmp_path: Path, titles: list[str]) -> None:
    items = read(tmp_path, [f"i{place}\t{title}" for place, title in enumerate(titles)])
    assert len(items.titles) == len(titles) + 1
    assert len(set(items.names)) == len(items.names)
    for given_title, title in zip(titles, items.titles[1:], strict=True):
        assert title == " ".join(title.split()) and title
        if given_title.isalnum():
            assert title == given_title


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Fish Called Wanda, A (1988)", "A Fish Called Wanda (1988)"),
        ("American in Paris, An", "An American in Paris"),
        ("Lion King, The: Special Edition", "The Lion King: Special Edition"),
        ("Adventures of Priscilla, Queen of the Desert, The", "The Adventures of Priscilla, Queen of the Desert"),
        ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
        ("Double vie, La (Double Life, The)", "La Double vie (The Double Life)"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Strike! (a.k.a. All I Wanna Do, The Hairy Bird)", "Strike! (a.k.a. All I Wanna Do, The Hairy Bird)"),
        ("Love, Actually", "Love, Actually"),
        ("Plan, Another", "Plan, Another"),
        (", The", ", The"),
    ],
)
def test_restore_article(title: str, expected: str) -> None:
    assert restore_article(title) == expected


def test_article_suffix_is_a_choice(tmp_path: Path) -> None:
    assert read(tmp_path, ["a\tPostino, Il"]).titles[1] == "Postino, Il"
    assert read(tmp_path, ["a\tPostino, Il"], article_suffix=True).titles[1] == "Il Postino"


@pytest.mark.parametrize("key", ["title_field", "year_field", "brand_field", "category_field"])
def test_absent_column_is_named_with_those_there_are(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: there is no column 'name'.*item_id, title, year, brand, genre"):
        read(tmp_path, ["a\tAlien"], **{key: "name"})


def test_malformed_files_are_refused_by_the_rules_of_all_atomic_files(tmp_path: Path) -> None:
    with pytest.raises(AtomicFileError, match=r"toy\.item, line 3: 6 cells, but the header has 5"):
        read(tmp_path, ["a\tAlien", "b\tBra\tzil\t1985\t\tComedy"])
    with pytest.raises(AtomicFileError, match=r"toy\.item, line 3, column item_id: '' is an empty id"):
        read(tmp_path, ["a\tAlien", "\tBrazil"])


def test_items_of_which_none_has_a_row(tmp_path: Path) -> None:
    with pytest.raises(
        AtomicFileError, match=r"2 of 2 ids .* no row in .*toy\.item: they are 'x', 'y' in \.inter and 'a', 'b' there"
    ):
        read(tmp_path, ["a\tAlien", "b\tBrazil"], item_ids=["[PAD]", "x", "y"])
    with pytest.raises(AtomicFileError, match=r"ITEM_ID_FIELD item_id: 1 of 2 ids .*'3\.0' in \.inter seems to be '3' there"):
        read(tmp_path, ["a\tAlien", "3\tBrazil"], item_ids=["[PAD]", "a", "3.0"])


def test_an_item_described_by_the_columns_that_say_something(tmp_path: Path) -> None:
    header = "item_id:token\ttitle:token_seq\tbrand:token\tmain_category:token_seq"
    lines = ["a\tHay\tKaytee\tFood, hay", "b\tCage\t\tHomes", "c\tBall", "d\tHay\tOxbow\t", "e"]
    items = read(tmp_path, lines, header, year_field=None, category_field=None)
    assert items.described(["brand", "main_category"]) == [
        "",
        "Hay (Kaytee) (brand: Kaytee, main category: Food, hay)",
        "Cage (main category: Homes)",
        "Ball",
        "Hay (Oxbow) (brand: Oxbow)",
        "item e",
    ]
    assert items.described(["main_category", "brand"])[1] == "Hay (Kaytee) (main category: Food, hay, brand: Kaytee)"
    assert items.described([]) == items.names
    with pytest.raises(
        ValueError, match="text_fields: .* no column 'title' besides the title; the columns are brand, main_category"
    ):
        items.described(["brand", "title"])


def test_fingerprint_is_of_the_texts(tmp_path: Path) -> None:
    first, again = read(tmp_path, ["a\tAlien\t1979"]), read(tmp_path, ["a\tAlien\t1979"])
    assert first.fingerprint() == again.fingerprint()
    assert len(first.fingerprint()) == 64
    for other in (["a\tAliens\t1979"], ["a\tAlien\t1986"], ["a\tAlien\t1979", "b\tBrazil"]):
        assert read(tmp_path, other).fingerprint() != first.fingerprint()


def test_same_as_csv_without_quoting(tmp_path: Path) -> None:
    items = read(tmp_path, ['a\t"A" b "\t1999', "b\t'\"\t2000"])
    with (tmp_path / "toy.item").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert items.titles[1:] == [row[1] for row in rows[1:]]


def test_columns_may_go_by_several_names(tmp_path: Path) -> None:
    file = tmp_path / "d.item"
    file.write_text("item_id:token\ttitle:token_seq\tdetails:token_seq\n1\tHeat\tA heist.\n")
    config: dict[str, object] = dict.fromkeys(["title_field", *COLUMNS])
    config |= {"title_field": ["movie_title", "title"], "description_field": ["description", "details"], "brand_field": ["brand"]}
    expected = {**dict.fromkeys(COLUMNS), "title_field": "title", "description_field": "details"}
    toy = AtomicFile(file, AtomicFormat())
    assert chosen_columns(toy, config) == expected
    assert chosen_columns(toy, {**config, "title_field": ["a", "b"]})["title_field"] == "a"
    assert chosen_columns(toy, {**dict.fromkeys(COLUMNS), "title_field": "b"})["title_field"] == "b"


def test_a_description_replaces_the_other_columns_where_it_is_read(tmp_path: Path) -> None:
    columns = {"year_field": "year", "description_field": "details"}
    items = ItemTexts(["", "Heat"], ["", "Heat"], {"year": ["", "1995"], "details": ["", "A heist."]}, columns)
    assert text_fields({"text_fields": None}, items) == ["year"]
    assert text_fields({"text_fields": None}, items, described=True) == ["details"]
    assert text_fields({"text_fields": []}, items, described=True) == []
    without = replace(items, columns={"year_field": "year"})
    assert text_fields({"text_fields": None}, without, described=True) == ["year"]


# -- what a column of a dataset is -------------------------------------------------------------------------------------


def test_ids_may_stand_in_for_titles(tmp_path: Path) -> None:
    items = read(tmp_path, ["a\tAlien\t1979", "b\tBrazil\t1985"], title_field="item_id")
    assert items.titles == ["", "a", "b"] and items.fields["title"] == ["", "Alien", "Brazil"]


@pytest.mark.parametrize(
    ("key", "column", "meant"), [("year_field", "title", "title_field"), ("category_field", "item_id", "ITEM_ID_FIELD")]
)
def test_a_column_with_another_meaning_is_refused(key: str, column: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"{key}: '{column}' is the column of {meant} already; name another one, or give {key}: ~"
    ):
        read(tmp_path, ["a\tAlien"], **{key: column})


def test_values_of_a_column_are_those_of_its_type_and_separator(tmp_path: Path) -> None:
    """``Film Noir`` is one genre where ``|`` separates them, and one brand where the column has a single text."""
    path = tmp_path / "toy.item"
    path.write_text(f"{HEADER}\na\tAlien\t1979\tFox Film\tDrama|Film Noir\nb\tBrazil\t1985\t\t\n")
    given = {"item_ids": ["[PAD]", "a", "b"], "id_field": "item_id", "title_field": "title", **FIELDS}
    bars, blanks = (ItemTexts.read(AtomicFile(path, AtomicFormat(seq_separator=one)), **given) for one in "| ")  # type: ignore[arg-type]
    assert bars.values("genre") == [[], ["Drama", "Film Noir"], []] and blanks.values("genre")[1] == ["Drama|Film", "Noir"]
    assert bars.values("brand") == blanks.values("brand") == [[], ["Fox Film"], []]
    assert bars.described(["genre"])[1] == "Alien (genre: Drama, Film Noir)"
    assert blanks.described(["genre"])[1] == "Alien (genre: Drama|Film Noir)"
    assert bars.fingerprint() != blanks.fingerprint()


@pytest.mark.parametrize("given", ["", []])
def test_an_empty_name_of_titles_is_refused(given: object, tmp_path: Path) -> None:
    read(tmp_path, ["a\tAlien"])
    with pytest.raises(ValueError, match=r"title_field: .* names no column of .*toy.item; its columns are item_id, title"):
        chosen_columns(AtomicFile(tmp_path / "toy.item", AtomicFormat()), {"title_field": given, **dict.fromkeys(COLUMNS)})
