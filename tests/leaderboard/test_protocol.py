"""The protocol of a table in words, from its run records."""

from __future__ import annotations

from typing import Any

import pytest

from recbole_llm.leaderboard.captions import caption
from recbole_llm.leaderboard.formats import to_latex, to_markdown
from recbole_llm.leaderboard.page import to_html
from recbole_llm.leaderboard.protocol import measured, protocol_words
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Leaderboard, from_json, to_json
from tests.leaderboard.boards import cell

SPLIT = {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)}
REPEATS = {"rm_dup_inter": "first", "dropped": 0, "repeated_targets": {"valid": 0.0, "test": 0.0}}
TIES = {"tie_order": "item", "tied_targets": {"valid": 0.1, "test": 0.2534}}
FULL = {"candidates_sha256": {}}


def board(**facts: Any) -> Leaderboard:
    return build([cell("A", 0.5, facts=facts), cell("B", 0.2, facts=facts), cell("Later")], flips=10)


def words(protocol: dict[str, Any], **facts: Any) -> list[str]:
    return protocol_words(board(protocol={"mask_history": None} | protocol, **facts).tables[0])


@pytest.mark.parametrize(
    ("candidates", "text"),
    [
        ({"num_negatives": 19, "source": "uniform"}, "20 candidates each (SHA-256 aaaaaaaaaaaa)"),
        ({"num_negatives": 1999, "source": "retriever"}, "2,000 candidates each (SHA-256 aaaaaaaaaaaa)"),
        ({"num_negatives": 19, "source": "file"}, "candidates (SHA-256 aaaaaaaaaaaa)"),  # a file may have any number
        (None, "candidates (SHA-256 aaaaaaaaaaaa)"),
    ],
)
def test_the_number_of_candidates(candidates: dict[str, Any] | None, text: str) -> None:
    assert words({}, config={"candidates": candidates}) == ["300 users", text]


def test_a_full_ranking_says_whether_the_history_is_masked() -> None:
    drawn = {"candidates": {"num_negatives": 19, "source": "uniform"}}  # the key has a default, although nothing is drawn
    assert words({"mask_history": True}, **FULL, config=drawn) == ["300 users", "full ranking, history masked"]
    assert measured([FULL | {"config": drawn}])["candidates"] is None
    because = {"mask_history": False, "unmasked_because": "mask_history: False"}
    assert words(because, **FULL) == ["300 users", "full ranking, history not masked (mask_history: False)"]
    uni = {"config": {"eval_args": {"mode": {"test": "uni100"}}}}
    assert words({}, **FULL, **uni) == ["300 users", "mode uni100, negatives drawn anew for each row"]
    assert words({"targets": "together"})[2:] == ["several targets per user, ranked together"]
    assert words({"targets": "one"})[2:] == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, []),
        ({"dropped": 1234}, ["of repeated interactions the first is kept (1,234 dropped)"]),
        ({"rm_dup_inter": "last", "dropped": 7}, ["of repeated interactions the last is kept (7 dropped)"]),
        (
            {"rm_dup_inter": None, "repeated_targets": {"valid": 0.2, "test": 0.314}},
            ["repeats are kept: 31.4 % of the test targets are in the history"],
        ),
        ({"rm_dup_inter": None, "repeated_targets": {"valid": None, "test": None}}, []),
        ({"rm_dup_inter": None}, []),  # there are none
    ],
)
def test_repeats(changes: dict[str, Any], text: list[str]) -> None:
    assert words({"repeats": REPEATS | changes})[2:] == text


def test_ties_of_time() -> None:
    assert words({"ties": TIES})[2:] == ["ties of time decide 25.3 % of the test targets (tie_order: item)"]
    assert words({"ties": TIES | {"tied_targets": {"valid": None, "test": None}}})[2:] == []


def test_a_known_split_is_named() -> None:
    known = {"verdict": "recognised: ml-1m, MovieLens 1M; ids differ", "recognised": "ml-1m", "nearest": "ml-1m"}
    assert words({}, passport=SPLIT | known)[2:] == ["split recognised: ml-1m, MovieLens 1M, ids differ"]
    near = {"verdict": "nearest known: ml-1m; about 25 % of the targets differ", "recognised": None, "nearest": "ml-1m"}
    assert words({}, passport=SPLIT | near)[2:] == ["split nearest known: ml-1m, about 25 % of the targets differ"]
    assert words({}, passport=SPLIT | {"verdict": "not known: ...", "recognised": None, "nearest": None})[2:] == []


def test_every_format_says_it_and_json_has_the_facts() -> None:
    leaderboard = board(protocol={"mask_history": None, "repeats": REPEATS, "ties": TIES})
    table = leaderboard.tables[0]
    assert from_json(to_json(leaderboard)) == leaderboard and table.measured["ties"] == TIES
    assert caption(leaderboard, table).startswith("300 users; candidates (SHA-256 aaaaaaaaaaaa); ties of time decide 25.3 %")
    assert "decide 25.3 % of" in to_markdown(leaderboard) and r"decide 25.3 \% of" in to_latex(leaderboard)
    assert "decide 25.3 % of the test targets (tie_order: item).</p>" in to_html(leaderboard)


def test_nothing_is_known_without_a_record() -> None:
    table = build([cell("Later")]).tables[0]
    assert measured([]) == {} == table.measured and protocol_words(table) == []
