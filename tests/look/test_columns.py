"""The columns of the page: which runs may stand side by side, and how they are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.cli.values import paths
from recbole_llm.data.sketches import sketch
from recbole_llm.look.columns import read_columns
from recbole_llm.store.json_files import sealed

SPLIT = {
    "counts": {"users": 3, "items": 9, "interactions": 30, "targets": {"valid": 3, "test": 3}},
    "filters": {"tie_order": "file"},
    "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64),
    "sketches": {"tokens": sketch(["u1\ti1"])},
}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Writes the record of a run into a folder; returns the folder."""

    def write(folder: str, model: str, rows: tuple[str, ...] = (), users: tuple[str, ...] = ("u1", "u2"), **facts: Any) -> str:
        ranks = {row: {user: 1 for user in users} for row in (model, *rows)}
        content = {
            "model": model,
            "dataset": "songs",
            "seed": 2020,
            "results": {row: {"hit@1": 1.0} for row in ranks},
            "ranks": ranks,
            "slices": {},
            "passport": SPLIT,
            "protocol": {"mask_history": None, "targets": "one"},
            "candidates_sha256": {"test": "a" * 64},
            "config": {},
        }
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "record.json").write_text(sealed(content | facts))
        return str(tmp_path / folder)

    return write


def test_names(run: Callable[..., str]) -> None:
    given = [run("a", "SASRec"), run("b", "BPR"), run("c", "BPR", seed=1), run("d", "TALLRec"), f"mine={run('e', 'TALLRec')}"]
    assert [column.name for column in read_columns(given)] == ["SASRec", "BPR (seed 2020)", "BPR (seed 1)", "TALLRec", "mine"]
    again = [*given, run("f", "TALLRec"), run("g", "TALLRec")]
    assert [column.name for column in read_columns(again)][-4:] == ["d", "mine", "f", "g"]


def test_rows_beside_the_models(run: Callable[..., str]) -> None:
    given = [run("a", "LoRACocktail", ("ingredient", "no adapter")), run("b", "TALLRec", ("no adapter",)), run("c", "BPR")]
    found = read_columns(given, ["no adapter", "BPR"])
    assert [column.name for column in found] == [
        "LoRACocktail",
        "LoRACocktail, no adapter",
        "TALLRec",
        "TALLRec, no adapter",
        "BPR",
    ]
    assert [column.is_model for column in found] == [True, False, True, False, True]
    with pytest.raises(ValueError, match="--rows=merged: no run has such a row; they have: LoRACocktail, ingredient, no adapter"):
        read_columns(given, ["merged"])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"candidates_sha256": {"test": "b" * 64}}, "ranked the candidates b.*but .*ranked the candidates a"),
        ({"protocol": {"mask_history": True, "targets": "one"}}, "BPR .*masked the users' histories"),
        (
            {"passport": {**SPLIT, "filters": {"tie_order": "random"}, "sha256": {**SPLIT["sha256"], "test": "e"}}},
            "the split of BPR",
        ),
        (
            {"passport": {**SPLIT, "filters": {"seed": 1}, "sha256": {**SPLIT["sha256"], "test": "e"}}},
            "the split of BPR is not that of SASRec: ",  # random splits of two seeds, which a leaderboard compares apart
        ),
        ({"users": ("u1", "u3")}, r"SASRec \(2 users\) and BPR \(2 users\) have different users \('u2' is in one only\)"),
    ],
)
def test_runs_that_were_measured_otherwise_are_refused_by_name(
    facts: dict[str, Any], message: str, run: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=f"^look: .*{message}.*give them a page of their own"):
        read_columns([run("a", "SASRec"), run("b", "BPR", **facts)])


def test_what_is_no_run(run: Callable[..., str], tmp_path: Path) -> None:
    one = run("a", "SASRec")
    for given, message in (
        ([one, f"{one}/record.json"], "is given twice"),
        ([one, str(tmp_path / "none")], "there is no run"),
        ([f" ={one}"], "the name is empty"),
        ([f"x={one}", f"x={run('b', 'BPR')}"], "x is the name of two columns"),
        ([run("c", "BPR", ranks={"BPR": {}})], "BPR has no ranks of its users"),
        ([run("d", "BPR", user_ids=False)], "was shared without the ids of its users; ask for one shared with --user_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            read_columns(given)
    record = Path(one) / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seed": 1}))
    with pytest.raises(ValueError, match=r"was edited: .*; repeat the run \(--model=.*\), or delete it"):
        read_columns([one])


def test_paths_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs").mkdir()
    assert paths("my runs") == ["my runs"] and paths("x=my runs") == ["x=my runs"]
    assert paths("a b 'my runs'") == ["a", "b", "my runs"]
