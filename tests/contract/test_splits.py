"""Every model, ours and RecBole's, has the same targets whatever orders equal times, and no model gets a repeat for free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.data.ties import ORDERS
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import MODELS
from tests.conftest import assembled, write_dataset

CLASSICAL = ["Pop", "BPR", "LightGCN", "ItemKNN", "NeuMF", "SASRec", "GRU4Rec", "BERT4Rec"]
SAME: dict[str, dict[str, Any]] = {"LlamaRec": {"lora_train_mode": "prefix"}}


def changed(folder: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """A folder with ``tiny`` whose rows are changed."""
    write_dataset(folder)
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *change(rows), ""]))
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` with times that four interactions share."""

    def coarse(rows: list[str]) -> list[str]:
        cells = [row.split("\t") for row in rows]
        return ["\t".join([user, item, str(int(time) // 12)]) for user, item, time in cells]

    return changed(tmp_path_factory.mktemp("tied"), coarse)


@pytest.fixture(scope="module")
def targets(tied: Path, module_settings: dict[str, Any]) -> dict[str, Any]:
    """Targets by order and phase, of the first model."""
    return {order: of_model("Pop", order, tied, module_settings) for order in ORDERS}


def of_model(name: str, order: str, tied: Path, settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    given = {**settings, "data_path": str(tied), "tie_order": order, **SAME.get(name, {})}
    made = assembled(name, given)
    found = {}
    for phase, loader in (("valid", made.valid), ("test", made.test)):
        data, own = loader._dataset, loader.candidates
        pairs = (data.id2token(field, data.inter_feat[field]) for field in ("user_id", "item_id"))
        found[phase] = dict(zip(*pairs, strict=True))
        ids = zip(data.id2token("user_id", own.users), data.id2token("item_id", own.targets), strict=True)
        assert dict(ids).items() <= found[phase].items() and len(own.users) == 60
        found[phase, "sha256"] = own.sha256
    return found


@pytest.mark.parametrize("name", [*MODELS, *CLASSICAL])
def test_every_model_has_the_targets_of_the_order(name: str, tied: Path, targets: Any, module_settings: dict[str, Any]) -> None:
    assert len({json.dumps(found["test"], sort_keys=True) for found in targets.values()}) == 3
    for order in ORDERS:
        assert of_model(name, order, tied, module_settings) == targets[order]


@pytest.mark.parametrize("name", ["SASRec", "TALLRec"])
def test_every_row_doubled_is_the_dataset_without_doubles(
    name: str, settings: dict[str, Any], data_path: Path, tmp_path: Path
) -> None:
    """With repeats, the target is the last item of the history and no negative is in it: SASRec had Hit@1 1.000 on such data."""
    folder = changed(tmp_path / "data", lambda rows: [row for row in rows for _ in range(2)])
    records = []
    for path in (data_path, folder):
        done = run_recbole_llm(
            name, "tiny", config_dict={**settings, "epochs": 3, "data_path": str(path), "checkpoint_dir": path.name}
        )
        records.append(json.loads(Path(done["record"]).read_text()))
    single, double = records
    assert double["results"] == single["results"] and double["candidates_sha256"] == single["candidates_sha256"]
    assert double["results"][name]["hit@1"] < 0.8
    count = double["protocol"]["repeats"].pop("dropped")
    assert count > 300 and single["protocol"]["repeats"].pop("dropped") == 0
    assert single["protocol"] == double["protocol"]
    assert double["protocol"]["repeats"] == {"rm_dup_inter": "first", "repeated_targets": {"valid": 0.0, "test": 0.0}}


def test_the_record_with_repeats_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = changed(tmp_path / "data", lambda rows: [row for row in rows for _ in range(2)])
    done = run_recbole_llm("Pop", "tiny", config_dict={**settings, "data_path": str(folder), "rm_dup_inter": None})
    protocol = json.loads(Path(done["record"]).read_text())["protocol"]
    assert protocol["repeats"] == {"rm_dup_inter": None, "dropped": 0, "repeated_targets": {"valid": 0.0, "test": 1.0}}
    assert protocol["ties"] == {"tie_order": "file", "tied_targets": {"valid": 0.0, "test": 0.0}}
