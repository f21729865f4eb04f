"""What any model saves as predictions is evaluated to exactly the same results when it is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_llm.evaluation.predictions import FILE
from recbole_llm.quick_start import run_recbole_llm

CANDIDATES: dict[str, Any] = {"eval_args": {"mode": "candidates"}}
RETRIEVED: dict[str, Any] = {"candidates": {"num_negatives": 9, "source": "retriever"}, "retriever_config": {"epochs": 1}}
FULL: dict[str, Any] = {"eval_args": {"mode": "full"}, "valid_metric": "NDCG@5"}


def record_of(name: str, settings: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], Path]:
    found = run_recbole_llm(name, "tiny", config_dict={**settings, **changes})
    path = Path(found["record"])
    return json.loads(path.read_text()), path.with_name(FILE)


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("Pop", CANDIDATES),  # equal scores
        ("Pop", FULL),
        ("BPR", RETRIEVED),  # candidates that may lack the target
        ("SASRec", FULL),
        ("NeuMF", FULL),  # scored item by item
        ("TALLRec", CANDIDATES),
        # the top of a retriever, re-ranked
        pytest.param("TALLRec", {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}, marks=pytest.mark.slow),
    ],
)
def test_saved_predictions_are_evaluated_to_the_same_ranks(name: str, protocol: dict, settings: dict[str, Any]) -> None:
    own, file = record_of(name, settings, **protocol, save_predictions=True, predictions_topk=40)
    assert own["predictions"] == FILE and file.is_file()
    table = pd.read_parquet(file)
    assert list(table.columns) == ["row", "user", "rank", "item", "score"]
    assert (
        str(table["score"].dtype) == "float32"
        and table["user"].str.match(r"u\d+$").all()
        and table["item"].str.match(r"i\d+$").all()
    )
    assert list(table["row"].unique()) == list(own["results"])
    for row in own["results"]:
        again, _ = record_of("Imported", settings, **protocol, predictions=str(file), predictions_row=row)
        assert again["ranks"]["Imported"] == own["ranks"][row], row
        assert again["results"]["Imported"] == own["results"][row], row
        assert again["tie_rate"]["Imported"] == own["tie_rate"][row], row
        assert again["slices"]["Imported"] == own["slices"][row], row
        assert again["candidates_sha256"].get("test") == own["candidates_sha256"].get("test")
        assert again["imported"]["remark"] == "" and again["imported"]["row"] == row


def test_the_list_of_a_full_ranking_is_enough_for_the_metrics_at_its_k(settings: dict[str, Any]) -> None:
    own, file = record_of("BPR", settings, **FULL, save_predictions=True)
    assert pd.read_parquet(file).groupby("user").size().eq(max(settings["topk"])).all()
    again, _ = record_of("Imported", settings, **FULL, predictions=str(file))
    found, expected = again["results"]["Imported"], own["results"]["BPR"]
    assert found == {name: value for name, value in expected.items() if name != "mrr"}  # nothing is known below the list
    for user, rank in own["ranks"]["BPR"].items():
        assert again["ranks"]["Imported"][user] == (rank if rank <= 5 else None)


def test_the_ranking_in_the_file_is_that_of_the_record(settings: dict[str, Any]) -> None:
    """By the ranks and by the items themselves: each user's target stands at its rank."""
    own, file = record_of("SASRec", settings, **CANDIDATES, save_predictions=True)
    table = pd.read_parquet(file)
    assert table.groupby("user")["rank"].apply(list).map(lambda ranks: ranks == [*range(1, 11)]).all()
    assert table.groupby("user")["score"].apply(lambda scores: scores.is_monotonic_decreasing).all()
    lines = pd.read_csv(Path(settings["data_path"]) / "tiny" / "tiny.inter", sep="\t").sort_values("timestamp:float")
    last = lines.groupby("user_id:token")["item_id:token"].last()
    targets = table[table["item"] == table["user"].map(last)].set_index("user")["rank"]
    assert targets.to_dict() == own["ranks"]["SASRec"]


def test_predictions_of_an_earlier_call_stay_beside_the_same_record(settings: dict[str, Any]) -> None:
    own, file = record_of("Pop", settings, save_predictions=True)
    saved = file.read_bytes()
    again, same = record_of("Pop", settings)
    assert again["fingerprint"] == own["fingerprint"] and same == file  # the option changes no result
    assert again["predictions"] == FILE and file.read_bytes() == saved


def test_predictions_of_an_earlier_call_do_not_stay_beside_another_record(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, file = record_of("Pop", settings, save_predictions=True)
    monkeypatch.setattr("recbole_llm.quick_start.record_code", lambda _: "other code")
    again, _ = record_of("Pop", settings)
    assert again["predictions"] is None and not file.exists()
    assert f"{file.name} is removed" in caplog.text and "--save_predictions=True" in caplog.text


def test_a_failed_run_leaves_no_file(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole_llm.evaluation.predictions import PredictionWriter

    def fail(self: PredictionWriter, *_: Any) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(PredictionWriter, "add", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        record_of("Pop", settings, save_predictions=True)
    assert not [file for file in Path(settings["checkpoint_dir"]).rglob("*") if "predictions" in file.name]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Pop", {"eval_args": {"mode": "uni10"}}, "save_predictions: eval_args mode 'uni10'"),
        (
            "SASRec",
            {"eval_args": {"mode": "full", "split": {"RS": [0.6, 0.2, 0.2]}}},
            "save_predictions: SASRec ranks the items anew",
        ),
    ],
)
def test_no_ranking_of_a_user_is_refused_before_training(
    name: str, changes: dict[str, Any], words: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole_llm.classical.trainer import ProtocolTrainer

    monkeypatch.setattr(ProtocolTrainer, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=words):
        record_of(name, settings, **changes, save_predictions=True)


def test_the_memory_of_the_writer_does_not_grow_with_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq
    import torch

    from recbole_llm.evaluation import predictions

    monkeypatch.setattr(predictions, "_GROUP", 100)
    schema = predictions._SCHEMA
    with pq.ParquetWriter(tmp_path / "file", schema) as file:
        writer = predictions.PredictionWriter(file, [f"u{i}" for i in range(500)], [f"i{i}" for i in range(20)], 5)
        writer.start("model")
        largest = 0
        for start in range(0, 500, 10):
            scores = torch.rand(10, 20)
            writer.add_catalogue(torch.arange(start, start + 10), scores, scores)
            largest = max(largest, writer._lines)
        writer.flush()
    assert largest < 100 and pq.ParquetFile(tmp_path / "file").num_row_groups == 25
    assert pq.read_table(tmp_path / "file").num_rows == 2500
