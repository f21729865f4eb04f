"""The rules by which papers read an answer, on answers and titles that are hard to read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recbole_llm.evaluation.published import ALLMREC, RECCOCKTAIL, WEAVEREC, contained, entries, exact_places, quoted

TITLES = ["It", "Titanic", "Alien", "Aliens", "A || B", "The Thing (1982)"]

EXACT = {  # answer: places of TITLES
    "": [0, 0, 0, 0, 0, 0],
    "||": [0, 0, 0, 0, 0, 0],
    "Titanic": [0, 1, 0, 0, 0, 0],
    "titanic": [0, 0, 0, 0, 0, 0],  # exact means exact
    "Titanic with It || It": [2, 0, 0, 0, 0, 0],
    "  Alien||Aliens  || It\n": [3, 0, 1, 2, 0, 0],
    "Aliens || Aliens || Alien": [0, 0, 3, 1, 0, 0],  # the first counts, and only once
    "Titanic || || It": [3, 1, 0, 0, 0, 0],  # an empty entry has its place
    "It || A || B || Titanic": [1, 3, 0, 0, 2, 0],  # the title that contains the separator is one entry
    "A || Titanic": [0, 2, 0, 0, 0, 0],
    "nothing || of || these || Titanic": [0, 0, 0, 0, 0, 0],  # beyond the depth
    "The Thing": [0, 0, 0, 0, 0, 0],
    '"Titanic"': [0, 0, 0, 0, 0, 0],
    "1. Titanic || It": [2, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("answer", EXACT)
def test_a_list_of_titles_is_split_and_compared_exactly(answer: str) -> None:
    assert exact_places(answer, TITLES, " || ", 3) == EXACT[answer]
    assert exact_places(answer, TITLES, "||", 3) == EXACT[answer]
    assert RECCOCKTAIL.places(answer, TITLES, "||") == EXACT[answer]


def test_entries_of_lines_and_of_wholly_empty_answers() -> None:
    assert entries("one\n\n two \nthree", "\n") == ["one", "", "two", "three"]
    assert entries("", "||") == [""] and entries("|| ||", "||") == ["", "", ""]
    assert exact_places("", [""], "||", 3) == [0]  # an empty title is never found


CONTAINED = {
    "": [0, 0, 0, 0, 0, 0],
    '"Titanic with it"': [1, 1, 0, 0, 0, 0],  # "It" is a hit, too: the paper's rule
    "ALIENS": [0, 0, 1, 1, 0, 0],
    'Recommend "Alien", not "Titanic"': [1, 1, 1, 0, 0, 0],  # between the outer quotation marks, and "it" in "titanic"
    'Titanic is not "Aliens"': [0, 0, 1, 1, 0, 0],
    'Alien "': [0, 0, 1, 0, 0, 0],  # one mark alone
    "Alien\nTitanic": [0, 0, 1, 0, 0, 0],  # the first line
    "\n\n Alien": [0, 0, 1, 0, 0, 0],
    "the thing (1982) and a || b": [0, 0, 0, 0, 1, 1],
}


@pytest.mark.parametrize("answer", CONTAINED)
def test_a_title_anywhere_in_the_answer_is_a_hit(answer: str) -> None:
    assert contained(answer, TITLES) == CONTAINED[answer] == ALLMREC.places(answer, TITLES, "unused")


def test_quoted_reads_what_the_papers_script_reads() -> None:
    assert quoted('  "Weird Al" Live ') == "weird al"
    assert quoted('""') == "" and quoted("") == ""


def test_metrics_have_names_of_their_own_and_the_papers_values() -> None:
    ranks = [1, 3, math.inf, 5]
    values, widths = WEAVEREC.results(ranks)
    gain = {1: 1.0, 3: 1 / np.log2(4), 5: 1 / np.log2(6)}
    assert values == pytest.approx(
        {
            "published_hr@1": 1 / 4,
            "published_hr@3": 2 / 4,
            "published_ndcg@1": 1 / 4,
            "published_ndcg@3": (gain[1] + gain[3]) / 4,
            "published_ndcg@5": sum(gain.values()) / 4,
            "published_mrr@5": (1 + 1 / 3 + 1 / 5) / 4,
        }
    )
    assert widths["published_hr@1"] == pytest.approx(1.96 * np.std([1, 0, 0, 0]) / 2) and widths.keys() == values.keys()
    assert [*RECCOCKTAIL.results(ranks)[0]] == ["published_hr@1", "published_hr@3", "published_ndcg@1", "published_ndcg@3"]
    assert ALLMREC.results([1, math.inf])[0] == {"published_hit@1": 0.5}
    assert WEAVEREC.depth == 5 and RECCOCKTAIL.depth == 3 and ALLMREC.depth == 1


def test_generation_stops_when_the_metrics_need_no_further_title() -> None:
    complete = RECCOCKTAIL.completes(" || ", ["one", "two"], continues=False)
    assert complete and not complete("one || two || three") and complete("one || two || three ||")
    longer = RECCOCKTAIL.completes("||", TITLES, continues=False)  # three titles may contain three more separators
    assert longer and not longer("It || A || B || Titanic ||") and longer("||" * 6)
    assert RECCOCKTAIL.completes("\n", ["one"], continues=True)("a\nb\nc\n")  # type: ignore[misc]
    assert ALLMREC.completes("\n", ["one"], continues=False) is None  # the whole answer is read, to its end
    assert ALLMREC.completes("\n", ["one"], continues=True)("a\n")  # type: ignore[misc]


def test_what_differs_from_the_paper_is_named() -> None:
    config: dict[str, Any] = {"prompt": "reccocktail", "chat": True, "candidate_separator": "||", "top_k_target": 5}
    config["published_max_new_tokens"] = None
    assert RECCOCKTAIL.differences(config) == []
    assert RECCOCKTAIL.differences(config | {"chat": False, "published_max_new_tokens": 9}) == [
        "chat: False instead of True",
        "published_max_new_tokens: 9 instead of None",
    ]
    assert RECCOCKTAIL.with_settings(config) == RECCOCKTAIL
    assert RECCOCKTAIL.with_settings(config | {"published_max_new_tokens": 9}) == replace(RECCOCKTAIL, max_new_tokens=9)
