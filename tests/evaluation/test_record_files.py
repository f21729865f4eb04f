"""A record is read only as it was written: damage, an edit, another run and figures that its ranks contradict are named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.record_files import DamagedRecordError, by_user, ranks_of, read_record
from recbole_llm.store.files import DamagedError
from recbole_llm.store.json_files import CHECKSUM, sealed

NAMES = ("hit@1", "ndcg@5", "mrr")
RANKS = {"u1": 1, "u2": 3, "u3": None, "u4": 2}


def content() -> dict[str, Any]:
    found = metrics.metrics([math.inf if rank is None else rank for rank in RANKS.values()], NAMES)
    return {
        "model": "Pop",
        "fingerprint": "f" * 64,
        "config": {"metric_decimal_place": 4},
        "results": {"Pop": {name: round(value, 4) for name, value in found.items()} | {"itemcoverage@5": 0.5}},
        "ranks": {"Pop": RANKS},
        "slices": {"Pop": {}},
        "passport": {"filters": {}, "sha256": {}},
        "protocol": {"mask_history": True},
        "seconds": {"train": 1.25e-7},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    path.write_text(sealed(content()))
    return path


def change(file: Path, edit: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    """Edit a record by hand; ``seal`` as one would who forges it, or as it is without a checksum."""
    record = json.loads(file.read_text())
    del record[CHECKSUM]
    edit(record)
    file.write_text(sealed(record) if seal else json.dumps(record))


def test_a_record_comes_back_as_it_was_written_in_any_layout(file: Path) -> None:
    assert {key: value for key, value in read_record(file, "f" * 64).items() if key != CHECKSUM} == content()
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=4))
    assert ranks_of(read_record(file), "Pop") == {"u1": 1, "u2": 3, "u3": math.inf, "u4": 2}
    change(file, lambda record: None)
    assert read_record(file)["results"] == content()["results"], "a shared record has no checksum"


def test_ranks_are_stored_by_token_and_missed_ones_are_null() -> None:
    found = by_user(["[PAD]", "a", "b"], [2, 1], [3.0, math.inf])
    assert found == {"b": 3, "a": None} and type(found["b"]) is int


@pytest.mark.parametrize(("name", "value"), [("hit@1", 0.99), ("ndcg@5", 0.6327), ("mrr", 0.4), ("hit@1", math.nan)])
@pytest.mark.parametrize("seal", [True, False])
def test_a_metric_that_the_ranks_contradict_is_named(file: Path, name: str, value: float, seal: bool) -> None:
    change(file, lambda record: record["results"]["Pop"].update({name: value}), seal=seal)
    with pytest.raises(
        DamagedError, match=rf"record\.json contradicts itself: {name} of Pop is {value:g}, and 0\.\d+ by its ranks"
    ):
        read_record(file)


def test_every_fault_comes_with_the_same_remedy(file: Path, tmp_path: Path) -> None:
    change(file, lambda record: record.update(seed=7, dataset="tiny"), seal=True)
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(DamagedRecordError) as edited:
        read_record(file)
    known = "repeat the run (--model=Pop --dataset=tiny and its other options), or delete it"
    assert str(edited.value) == f"{edited.value.fault}; {known}" and edited.value.fault.startswith(f"{file} is damaged or was")
    file.write_text("{")
    with pytest.raises(DamagedRecordError) as cut:
        read_record(file)
    assert str(cut.value).endswith("; repeat the run (the same model and dataset and its other options), or delete it")


def test_so_is_an_edited_rank(file: Path) -> None:
    change(file, lambda record: record["ranks"]["Pop"].update(u4=1), seal=True)
    with pytest.raises(DamagedError, match="hit@1 of Pop is 0.25, and 0.5 by its ranks"):
        read_record(file)


def test_a_slice_that_the_ranks_contradict_is_named(file: Path) -> None:
    def edit(record: dict[str, Any], hit: float) -> None:
        record["slice_users"] = {"cold": ["u1", "u2"]}
        record["slices"]["Pop"]["cold"] = {"users": 2, "hit@1": hit, "half_width_95": {"hit@1": 0.1}}

    change(file, lambda record: edit(record, 0.5), seal=True)
    read_record(file)
    change(file, lambda record: edit(record, 0.9), seal=True)
    with pytest.raises(DamagedError, match="contradicts itself: hit@1 of Pop, slice cold is 0.9, and 0.5 by its ranks"):
        read_record(file)


def test_ranks_that_were_taken_away_do_not_free_the_metrics(file: Path) -> None:
    """Candidates of one target for each user have ranks in every row."""
    measured = {"protocol": {"mask_history": None, "targets": "one"}, "candidates_sha256": {"test": "a" * 64}}
    change(file, lambda record: record.update(measured), seal=True)
    read_record(file)
    change(file, lambda record: record["ranks"].update(Pop={}) or record["results"]["Pop"].update({"hit@1": 0.99}), seal=True)
    with pytest.raises(DamagedError, match="contradicts itself: Pop has no ranks of its users"):
        read_record(file)


@pytest.mark.parametrize(
    ("old", "new"), [("1.25e-07", "1.25e-08"), ("true", "false"), ('"u1": 1', '"u5": 1'), ("0.5\n", "0.6\n")]
)
def test_any_other_edit_is_noticed(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    with pytest.raises(DamagedError, match="is damaged or was edited: its values are not those that the run wrote"):
        read_record(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"7", b"{}"])
def test_what_is_no_record_is_named(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(
        DamagedError, match=r"record\.json is damaged: it (is not JSON|holds a|does not have the form of a record)"
    ):
        read_record(file)


@pytest.mark.parametrize(
    "edit",
    [
        {"results": None},
        {"results": {"Pop": [1]}},
        {"results": {"Pop": {"hit@1": "much"}}},
        {"results": {"Pop": {"hit@1": True}}},
        {"ranks": []},
        {"ranks": {"Pop": {"u1": 0}}},
        {"ranks": {"Pop": {"u1": "1"}}},
        {"slices": {"Pop": 1}},
        {"config": [1]},
        {"config": {"metric_decimal_place": -300}},  # any metric would follow from any ranks
        {"config": {"metric_decimal_place": "4"}},
        {"slice_users": {"cold": [1]}},
        {"passport": "none"},
        {"protocol": 3},
        {"seconds": []},
    ],
)
def test_other_forms_are_named(file: Path, edit: dict[str, Any]) -> None:
    change(file, lambda record: record.update(edit))
    with pytest.raises(DamagedError, match="does not have the form of a record"):
        read_record(file)


def test_a_record_of_another_run_or_of_an_earlier_state_is_named(file: Path) -> None:
    with pytest.raises(DamagedError, match="is the record of a run with other settings"):
        read_record(file, "e" * 64)
    for key in ("passport", "protocol"):
        change(file, lambda record, key=key: record.pop(key))
        with pytest.raises(DamagedError, match="is from an earlier state of this package and does not say how it was measured"):
            read_record(file)
        file.write_text(sealed(content()))
    with pytest.raises(FileNotFoundError):
        read_record(file.with_name("none.json"))


def test_users_with_several_targets_have_metrics_and_no_ranks(file: Path) -> None:
    change(file, lambda record: record.update(ranks={"Pop": {}}), seal=True)
    assert ranks_of(read_record(file), "Pop") == {} == ranks_of(read_record(file), "other")


@pytest.mark.parametrize(
    "change",
    [
        {"stages": {"phase-1": "../../elsewhere"}},
        {"stages": {"phase-1": "/etc"}},
        {"stages": {"phase-1": 3}},
        {"checkpoint": "weights.pth"},
        {"checkpoint": {"file": 1, "sha256": "0"}},
        {"checkpoint": {"file": "weights.pth"}},
    ],
)
def test_paths_in_records_are_names_within_their_run(file: Path, change: dict[str, Any]) -> None:
    file.write_text(sealed({**json.loads(file.read_text()), **change}))
    with pytest.raises(DamagedError, match="does not have the form of a record"):
        read_record(file)
