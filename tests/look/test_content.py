"""What the page says of a user is what the record says, for models on candidates and on the catalogue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_llm import cli
from recbole_llm.look.columns import Column, read_columns
from recbole_llm.look.content import chosen_users, page_content
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.json_files import sealed
from tests.conftest import write_predictions

FULL: dict[str, Any] = {"eval_args": {"mode": "full"}}
RERANKED: dict[str, Any] = {
    "eval_args": {"mode": {"valid": "candidates", "test": "full"}},
    "retriever_top": 5,
    "retriever_config": {"epochs": 1},
}
RETRIEVED: dict[str, Any] = {"candidates": {"source": "retriever", "num_negatives": 9}, "retriever_config": {"epochs": 1}}


def trained(name: str, settings: dict[str, Any], **changes: Any) -> str:
    return str(Path(run_recbole_llm(name, "tiny", config_dict={**settings, **changes})["record"]).parent)


def check(content: dict[str, Any], columns: list[Column], last_items: dict[str, list[str]]) -> None:
    """Histories and targets are those of the files, ranks those of the records, and each target stands at its rank."""
    ids = [item[0] for item in content["items"]]
    assert len(content["users"]) > 10 and all(column["odd"] == 0 for column in content["columns"])
    for user in content["users"]:
        assert [ids[item] for item in user["history"]] == last_items[user["id"]][-2::-1]
        assert user["length"] == len(last_items[user["id"]]) - 1 and ids[user["target"]] == last_items[user["id"]][-1]
        for column, (rank, items, scores, truth) in zip(columns, user["ranked"], strict=True):
            assert rank == column.record["ranks"][column.row][user["id"]]
            assert (items.index(user["target"]) + 1 if user["target"] in items else None) == (
                rank if rank is not None and rank <= content["top"] else None
            )
            assert len(items) == len(scores) == len(set(items)) and scores == sorted(scores, reverse=True)
            assert truth == (scores[rank - 1] if user["target"] in items else truth)


@pytest.fixture(scope="module")
def last_items(data_path: Path) -> dict[str, list[str]]:
    lines = pd.read_csv(data_path / "tiny" / "tiny.inter", sep="\t").sort_values("timestamp:float", kind="stable")
    return lines.groupby("user_id:token")["item_id:token"].apply(list).to_dict()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BPR", {}),
        ("SASRec", FULL),
        ("Pop", FULL),  # equal scores
        ("Imported", {}),
        pytest.param("TALLRec", RERANKED, marks=pytest.mark.slow),
        pytest.param("TALLRec", RETRIEVED, marks=pytest.mark.slow),  # some targets are not among the candidates
        pytest.param("SASRec", {**FULL, "mask_history": False}, marks=pytest.mark.slow),
        pytest.param("Imported", FULL, marks=pytest.mark.slow),
        pytest.param("RecentPop", {}, marks=pytest.mark.slow),
        pytest.param("NeuMF", {}, marks=pytest.mark.slow),
        pytest.param("Laser", FULL, marks=pytest.mark.slow),
        pytest.param("ALLMRec", {}, marks=pytest.mark.slow),
        pytest.param("Cascade", {"llm_ranker": "TALLRec", "routing_users": 20}, marks=pytest.mark.slow),
    ],
)
def test_the_truth_stands_where_the_record_says(
    name: str, changes: dict[str, Any], settings: dict[str, Any], last_items: dict[str, list[str]]
) -> None:
    columns = read_columns([trained(name, settings, **changes)])
    check(page_content(columns, top=4), columns, last_items)


def test_rows_side_by_side_from_cached_scores_or_anew(
    settings: dict[str, Any], last_items: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"lora_epochs": 1, "train_samples": 8, "valid_users": 4}
    columns = read_columns([trained("TALLRec", settings, **short), trained("Pop", settings)], ["no adapter"])
    with monkeypatch.context() as patched:  # an LM takes minutes for what the run has cached
        patched.setattr("recbole_llm.llm.likelihood.TitleLikelihood.__call__", lambda *_: pytest.fail("scored again"))
        cached = page_content(columns, top=10)
    check(cached, columns, last_items)
    assert [column["name"] for column in cached["columns"]] == ["TALLRec", "TALLRec, no adapter", "Pop"]
    assert cached["width"] == 10 and cached["candidates"] == columns[0].record["candidates_sha256"]["test"]
    folder = Path(settings["checkpoint_dir"]) / "scores"
    shutil.rmtree(folder)
    assert page_content(columns, top=10)["users"] == cached["users"]
    assert not folder.exists(), "scores of a part of the users are no result of the run"


@pytest.fixture(scope="module")
def columns(module_settings: dict[str, Any]) -> list[Column]:
    return read_columns([trained("BPR", module_settings, text_fields=["genre"])])


def test_texts_counts_and_cold_targets(columns: list[Column], data_path: Path) -> None:
    content = page_content(columns, ["u3", "u1", "u3"], top=2)
    assert [user["id"] for user in content["users"]] == ["u3", "u1"] and not content["drawn"]
    shown = {item[0]: item[1:] for item in content["items"]}
    for line in (data_path / "tiny" / "tiny.item").read_text().splitlines()[1:]:
        item, title, _, genre = line.split("\t")
        assert shown.get(item, [title, genre, ""]) == [title, genre, ""]
    cold = columns[0].record["slice_users"]["cold"]
    everyone = page_content(columns, 1000)
    assert [user["id"] for user in everyone["users"] if user["cold"]] == sorted(cold, key=lambda user: (len(user), user)) != []
    counts = {
        user["cold"]: [one["trained"] for one in everyone["users"] if one["cold"] == user["cold"]] for user in everyone["users"]
    }
    assert max(counts[True]) <= min(counts[False])


def test_the_same_users_are_drawn_each_time(columns: list[Column]) -> None:
    drawn = chosen_users(columns, 8)
    assert len(set(drawn)) == 8 and chosen_users(columns, 8) == drawn and {*drawn} < {*chosen_users(columns, 20)}
    assert {*chosen_users(columns, 1000)} == {*columns[0].ranks}
    for users, message in ((0, "--users=0"), (["nobody"], "have no test user 'nobody'")):
        with pytest.raises(ValueError, match=message):
            chosen_users(columns, users)
    with pytest.raises(ValueError, match="--top=0"):
        page_content(columns, top=0)


def test_the_command(columns: list[Column], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, ids = str(columns[0].path.parent), tmp_path / "users.txt"
    ids.write_text("u3\nu1\n")
    for users, words in (("7", "7 users; mine"), (str(ids), "2 users; mine")):
        cli.main(["look", "--runs", f"mine={run}", f"--users={users}", "--out=mine.html"])
        assert capsys.readouterr().out == f"mine.html: {words}\n" and '"mine"' in Path("mine.html").read_text()
    for given, words in (("--users=none", "--users: none cannot be read"), ("--rows=merged", "no run has such a row")):
        with pytest.raises(SystemExit):
            cli.main(["look", f"--runs={run}", given])
        assert words in capsys.readouterr().err


def test_other_candidates_than_those_of_the_run_are_refused(settings: dict[str, Any]) -> None:
    run = Path(trained("Pop", settings))
    record = json.loads((run / "record.json").read_text())
    record["candidates_sha256"]["test"] = "f" * 64  # as if today's code drew others
    (run / "record.json").write_text(sealed(record))
    with pytest.raises(ValueError, match=r"the candidates of .* \(SHA-256 ffffffffffff\) are no longer what its settings give"):
        page_content(read_columns([str(run)]))


@pytest.mark.parametrize("changes", [{}, FULL])
def test_a_user_of_whom_a_file_of_predictions_has_nothing(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path, last_items: dict[str, list[str]]
) -> None:
    lines = [line for line in Path(settings["predictions"]).read_text().splitlines() if not line.startswith("u3,")]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    columns = read_columns([trained("Imported", settings, predictions=str(tmp_path / "mine.csv"), **changes)])
    content = page_content(columns)
    check(content, columns, last_items)
    assert [user["ranked"] for user in content["users"] if user["id"] == "u3"] == [[[None, [], [], None]]]


def test_other_predictions_than_those_of_the_run_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    file = shutil.copy(settings["predictions"], tmp_path / "mine.csv")
    columns = read_columns([trained("Imported", settings, predictions=str(file))])
    write_predictions(Path(file), seed=1)
    with pytest.raises(ValueError, match=r"mine\.csv is no longer the file of predictions that .* evaluated"):
        page_content(columns)


def test_a_list_that_disagrees_with_the_record_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    columns = read_columns([trained("Pop", settings)])
    monkeypatch.setattr("recbole_llm.look.rankings.finite", lambda scores: -scores)
    content = page_content(columns)
    assert content["columns"][0]["odd"] > 10
    assert f"Pop: for {content['columns'][0]['odd']} of {len(content['users'])} users, the list" in caplog.text
    assert all(user["ranked"][0][0] == columns[0].record["ranks"]["Pop"][user["id"]] for user in content["users"])
