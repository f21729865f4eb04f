"""Predictions of another framework: the users and candidates of every model, and what they lack is missed and counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_llm.config import LLMConfig
from recbole_llm.config.predictions import predictions_file
from recbole_llm.leaderboard.board import make_leaderboard
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.leaderboard.tuning import tune
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import get_model

FULL = {"eval_args": {"mode": "full"}}


@pytest.fixture
def table(settings: dict[str, Any]) -> pd.DataFrame:
    """Scores of all items for all users; each user's target has the highest one."""
    found = pd.read_csv(settings["predictions"])
    found.loc[found["item_id"] == found["user_id"].map(targets(settings)), "score"] = 2.0
    return found


def history(settings: dict[str, Any]) -> pd.DataFrame:
    lines = pd.read_csv(Path(settings["data_path"]) / "tiny" / "tiny.inter", sep="\t")
    return lines.set_axis(["user", "item", "time"], axis=1).sort_values("time")


def targets(settings: dict[str, Any]) -> pd.Series:
    return history(settings).groupby("user")["item"].last()


def run(settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    table.to_parquet(tmp_path / "file.parquet", index=False)
    found = run_recbole_llm(
        "Imported", "tiny", config_dict={**settings, "predictions": str(tmp_path / "file.parquet"), **changes}
    )
    return json.loads(Path(found["record"]).read_text())


@pytest.mark.parametrize("protocol", [{}, FULL])
def test_a_perfect_file_is_perfect_and_lacks_nothing(
    protocol: dict, settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    record = run(settings, table, tmp_path, **protocol, origin="an oracle")
    assert record["results"]["Imported"]["hit@1"] == 1 and set(record["ranks"]["Imported"].values()) == {1}
    about = record["imported"]
    assert about["origin"] == "an oracle" and about["remark"] == "" and about["users"] == 60 and about["missing users"] == 0
    assert about["file"] == str(tmp_path / "file.parquet") and len(about["sha256"]) == 64
    assert record["best_valid_result"] is None and record["trained_parameters"] == 0 and record["stages"] == {}


@pytest.mark.parametrize("protocol", [{}, FULL])
def test_missing_users_are_missed(
    protocol: dict, settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = run(settings, table[~table["user_id"].isin(["u3", "u7", "u8"])], tmp_path, **protocol)
    ranks, results = record["ranks"]["Imported"], record["results"]["Imported"]
    assert {user for user, rank in ranks.items() if rank is None} == {"u3", "u7", "u8"} and set(ranks.values()) == {1, None}
    assert results["hit@1"] == results["hit@5"] == results["ndcg@5"] == pytest.approx(57 / 60)
    assert "mrr" not in results  # nobody knows the rank of a missed target
    assert record["imported"]["remark"].startswith("3 of 60 users missing") and record["missed_targets"] == {"Imported": 3}
    assert "3 of 60 evaluation users are not in" in caplog.text


def test_missing_candidates_rank_below_all_others_and_a_missing_target_is_missed(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    own = targets(settings)
    of_target = table["item_id"] == table["user_id"].map(own)
    table.loc[of_target, "score"] = -1.0  # worst of all that are listed
    whole = run(settings, table, tmp_path)["ranks"]["Imported"]
    assert set(whole.values()) == {10}
    alone = run(settings, table[of_target], tmp_path)
    assert set(alone["ranks"]["Imported"].values()) == {1} and alone["imported"]["remark"] == "540 of 600 candidates missing"
    without = run(settings, table[~of_target], tmp_path, topk=[1, 5, 10])
    assert set(without["ranks"]["Imported"].values()) == {None} and without["results"]["Imported"]["hit@10"] == 0
    assert without["imported"]["remark"] == "60 of 600 candidates missing"


def test_equal_scores_have_the_order_of_the_candidate_file(settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path) -> None:
    """A constant file is at chance, not first."""
    ranks = list(run(settings, table.assign(score=1.0), tmp_path)["ranks"]["Imported"].values())
    assert 3 < np.mean(ranks) < 8 and len(set(ranks)) > 5


def test_a_full_ranking_leaves_the_history_out(settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path) -> None:
    known = history(settings).groupby("user")["item"].apply(lambda items: set(items.iloc[:-1]))
    seen = [item in known[user] for user, item in zip(table["user_id"], table["item_id"], strict=True)]
    table.loc[seen, "score"] = 3.0  # above the target
    record = run(settings, table, tmp_path, **FULL)
    assert set(record["ranks"]["Imported"].values()) == {1}
    assert record["imported"]["known items"] == sum(seen) and record["imported"]["short lists"] == 0


def test_lists_that_are_too_short_for_topk_are_refused_and_some_short_ones_counted(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = table.sort_values("score", ascending=False).groupby("user_id")
    with pytest.raises(ValueError, match=r"lists of .*file.parquet have at most 3 items, but topk goes to 5; give at least 5"):
        run(settings, best.head(3), tmp_path, **FULL)
    some = pd.concat([best.head(30), best.head(1)[best.head(1)["user_id"] == "u5"]]).drop_duplicates(["user_id", "item_id"])
    some = some[(some["user_id"] != "u5") | (some["score"] == 2.0)]
    record = run(settings, some, tmp_path, **FULL)
    assert record["results"]["Imported"]["hit@1"] == 1
    assert record["imported"]["short lists"] >= 1 and "lists shorter than 5" in record["imported"]["remark"]
    assert "users have fewer than 5 items" in caplog.text


def test_a_short_list_gains_nothing_from_what_fills_it_up(settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path) -> None:
    """RecBole's top k must have k items; the target is never one that fills it."""
    wrong = table[table["item_id"] != table["user_id"].map(targets(settings))]
    few = wrong.sort_values("score").groupby("user_id").head(5)
    results = run(settings, few, tmp_path, **FULL, topk=[1, 5])["results"]["Imported"]
    assert set(results.values()) == {0}


def test_scores_of_drawn_candidates_are_no_full_ranking(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = table.sort_values("score", ascending=False).groupby("user_id").head(6)
    run(settings, best[(best["user_id"] != "u5") | (best["score"] < 2.0)], tmp_path, **FULL)
    assert "this is not a full ranking" not in caplog.text  # one target is missed, as by a model
    run(settings, best, tmp_path)
    assert "this is not a full ranking" not in caplog.text
    run(settings, best, tmp_path, **FULL)
    assert "each of the 60 users has the target among at most 6 of" in caplog.text


def test_metrics_of_the_lists_are_refused_where_a_list_is_short(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    """RecBole would fill the list up with any items, and count them."""
    lists = {**FULL, "metrics": ["NDCG", "ItemCoverage"], "topk": [5]}
    assert run(settings, table, tmp_path, **lists)["results"]["Imported"]["itemcoverage@5"] > 0
    for short in (table[table["user_id"] != "u3"], table[(table["user_id"] != "u3") | (table["score"] == 2.0)]):
        with pytest.raises(
            ValueError, match=r"metrics: ItemCoverage describe lists of 5 items, and those of 1 users in .* shorter"
        ):
            run(settings, short, tmp_path, **lists)
        assert run(settings, short, tmp_path, **FULL)["results"]["Imported"]["hit@1"] > 0.98


def test_users_without_predictions_at_all_and_wrong_modes_are_refused(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    few = {"eval_users": 5}
    asked = run(settings, table, tmp_path, **few)["ranks"]["Imported"]
    with pytest.raises(ValueError, match="has none of the 5 evaluation users"):
        run(settings, table[~table["user_id"].isin(asked)], tmp_path, **few)
    with pytest.raises(ValueError, match="mode 'uni10' at test draws other items"):
        run(settings, table, tmp_path, eval_args={"mode": "uni10"})


def test_a_search_has_nothing_to_compare(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "space.hyper").write_text("learning_rate choice [0.1, 0.2]\n")
    given = [f"--{key}={settings[key]}" for key in ("data_path", "checkpoint_dir", "predictions")]
    with pytest.raises(ValueError, match="--model=Imported: it trains nothing and has no validation score"):
        tune("Imported", "tiny", params_file=tmp_path / "space.hyper", arguments=given)


def test_the_file_is_named_and_exists(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predictions: Imported needs a file; give --predictions=FILE"):
        run_recbole_llm("Imported", "tiny", config_dict={**settings, "predictions": None})
    with pytest.raises(FileNotFoundError, match="predictions: there is no file .*gone.csv"):
        run_recbole_llm("Imported", "tiny", config_dict={**settings, "predictions": str(tmp_path / "gone.csv")})


def test_the_content_of_the_file_names_the_record_and_its_place_does_not(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    table.to_csv(first, index=False)
    table.to_csv(second, index=False)

    def record(file: Path, name: str = "Imported") -> Path:
        return LLMConfig(name, "tiny", config_dict={**settings, "predictions": str(file)}).record_file

    assert record(first) == record(second)
    pop = record(first, "Pop")
    table.assign(score=-table["score"]).to_csv(second, index=False)
    assert record(first) != record(second) and pop == record(second, "Pop")


def test_a_leaderboard_has_a_row_for_a_file_and_evaluates_a_changed_one_again(
    settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    table.to_csv(tmp_path / "scores.csv", index=False)
    row = {
        "model": "Imported",
        "settings": {"predictions": str(tmp_path / "scores.csv"), "origin": "RecTools", "note": "60 epochs"},
    }
    plan = {"dataset": "tiny", "seeds": [1, 2], "models": {"theirs": row, "Pop": {}}}
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    given = {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric")}
    tasks = read_plan(file, given)
    assert [task.seed for task in tasks if task.label == "theirs"] == [1]  # one file has no spread over seeds
    for task in tasks:
        if task.model in ("Imported", "Pop"):
            run_recbole_llm(task.model, "tiny", cmd_line=task.arguments[2:])
    board, _ = make_leaderboard(file, given, show=True)
    rows = {row.label: row for row in board.tables[0].rows}
    assert rows["theirs"].metrics["hit@1"] == 1 and rows["theirs"].note == "RecTools; 60 epochs"
    assert rows["theirs"].training_seconds is None and rows["theirs"].trained_parameters is None  # unknown here
    assert rows["theirs"].p_values["Pop"] < 0.01 and rows["theirs"].beats and rows["theirs"].half_width["hit@1"] is None
    table.assign(score=0.0).to_csv(tmp_path / "scores.csv", index=False)
    board, _ = make_leaderboard(file, given, show=True)
    assert {row.label: [cell.status for cell in row.cells] for row in board.tables[0].rows}["theirs"] == ["not run"]


@pytest.mark.parametrize("in_file", [False, True])
def test_a_file_for_each_seed(in_file: bool, settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path) -> None:
    for seed in (1, 2):
        table.assign(score=table["score"] * seed).to_csv(tmp_path / f"scores-{seed}.csv", index=False)
    given = {"predictions": str(tmp_path / "scores-{seed}.csv")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given))
    entry = {"config_files": str(tmp_path / "own.yaml")} if in_file else {"settings": given}
    plan = {"dataset": "tiny", "seeds": [1, 2], "models": {"Imported": entry}}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(plan))
    tasks = [
        task for task in read_plan(tmp_path / "board.yaml", {"data_path": settings["data_path"]}) if task.model == "Imported"
    ]
    assert [predictions_file(task.config).name for task in tasks] == ["scores-1.csv", "scores-2.csv"]


def test_an_internal_number_is_no_token(settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path) -> None:
    table["user_id"] = table["user_id"].str[1:].astype(int)
    with pytest.raises(ValueError, match=r"row 1, column user_id: there is no user '0' in the dataset; its ids are the tokens"):
        run(settings, table, tmp_path)


def test_it_says_what_it_is(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], table: pd.DataFrame, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    run(settings, table, tmp_path, origin="RecTools 0.19")
    assert "columns user = user_id, item = item_id, score = score" in caplog.text and "RecTools 0.19" in caplog.text
    model = get_model("Imported")
    assert not model.has_validation and model.trained_in_stages and not model.uses_item_text
