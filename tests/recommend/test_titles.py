"""Titles as people type them find their items."""

from __future__ import annotations

import pytest

from recbole_llm.recommend.titles import Titles

NAMES = ["", "Schindler’s List", "Léon", "Face/Off – The “Game”", "Rock’n Roll", "Rock'n Roll", "A | B’s"]
TITLES = Titles(["[PAD]", *map(str, range(1, len(NAMES)))], NAMES, NAMES, ["", "1993", "", "", "", "", ""])


def test_a_title_may_have_the_sign_that_separates_titles() -> None:
    names = ["", "Home", "Home, Pt. 2 | Remix", "Rain"]
    titles = Titles(["[PAD]", "1", "2", "3"], names, names)
    assert titles.split("Home | home, Pt. 2 | REMIX|rain||id:3") == ["Home", "home, Pt. 2 | REMIX", "rain", "id:3"]
    assert titles.split("title:Home, Pt. 2 | Remix") == ["title:Home, Pt. 2 | Remix"]
    assert titles.split(" | ") == []


@pytest.mark.parametrize(
    ("given", "item"),
    [
        ("schindler's list", 1),
        ("title:Schindler´s List (1993)", 1),
        ("Le\u0301on", 2),
        ("Ｌéon", 2),
        ('face/off - the "game"', 3),
        ("Face/Off — The «Game»", 3),
        ("rock’n roll", 4),  # as it stands in the data
        ("rock'n roll", 5),
    ],
)
def test_quotation_marks_dashes_and_forms_of_unicode_make_no_other_title(given: str, item: int) -> None:
    assert TITLES.find(given) == item
    assert TITLES.split(f"{given}|a | b's") == [given, "a | b's"]


def test_a_title_that_could_be_several_items_is_not_found() -> None:
    with pytest.raises(ValueError, match="no item has the title or the id 'Rock‘n Roll'; nearest titles: Rock.n Roll"):
        TITLES.find("Rock‘n Roll")
