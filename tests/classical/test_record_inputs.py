"""A record names the contents of all files that its settings name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.classical.record_inputs import changed, keep_aside, record_inputs
from recbole_llm.config import LLMConfig
from recbole_llm.store.json_files import sealed

FILES = {
    "tiny.inter": "data/tiny/tiny.inter",
    "tiny.item": "data/tiny/tiny.item",
    "other.inter": "data/other/other.inter",
    "other.yaml": "data/other/other.yaml",
    "candidates.test": "mine.candidates",
    "adapters.ingredient/adapter_config.json": "adapter/adapter_config.json",
    "llm_path": "lm/config.json",
}


@pytest.fixture
def given(tmp_path: Path, data_path: Path, tiny_lm: Path) -> dict[str, Any]:
    shutil.copytree(data_path, tmp_path / "data")
    shutil.copytree(tiny_lm, tmp_path / "lm")
    (tmp_path / "data/other/other.yaml").write_text("user_inter_num_interval: '[2,inf)'\n")
    (tmp_path / "adapter").mkdir()
    for name in ("mine.candidates", "adapter/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    return {
        "data_path": str(tmp_path / "data"),
        "llm_path": str(tmp_path / "lm"),
        "adapters": {"ingredient": str(tmp_path / "adapter")},
        "candidates": {"source": "file", "file": {"test": str(tmp_path / "mine.candidates")}},
        "source_datasets": ["other"],
    }


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changes_is_named(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    config = LLMConfig("WeaveRec", "tiny", config_dict=given)
    record = json.loads(json.dumps({"inputs": record_inputs(config)}))
    os.utime(tmp_path / FILES[name], (1, 1))
    assert changed(record, config) == [], "its content counts"
    (tmp_path / FILES[name]).write_text((tmp_path / FILES[name]).read_text() + " ")
    assert changed(record, config) == [name]


def test_each_setting_of_a_text_encoder_counts(tmp_path: Path, given: dict[str, Any]) -> None:
    encoder = tmp_path / "encoder"
    (encoder / "1_Pooling").mkdir(parents=True)
    files = [encoder / name for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")]
    for file in files:
        file.write_text("{}")
    values = {"data_path": given["data_path"], "text_encoder_path": str(encoder)}
    for file in files:
        config = LLMConfig("AlphaRec", "tiny", config_dict=values)
        record = {"inputs": record_inputs(config)}
        assert changed(record, config) == []
        file.write_text('{"max_seq_length": 7}')
        assert changed(record, config) == ["text_encoder_path"]


def test_a_run_on_other_data_of_the_same_name_is_kept_aside(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "Pop-toy-1" / "record.json"
    assert keep_aside(file, {"toy.inter": "a"}) is None, "there is none"
    for number, inter in enumerate("ab", start=2):
        file.parent.mkdir(parents=True)
        file.write_text(sealed({"inputs": {"toy.inter": inter, "cf_checkpoint": "c"}}))
        assert keep_aside(file, {"toy.inter": inter}) is None, "the same tables"
        assert keep_aside(file, {"toy.inter": "c"}) == tmp_path / "runs" / f"Pop-toy-1-{number}"
    file.parent.mkdir(parents=True)
    file.write_text(sealed({}))
    assert keep_aside(file, {"toy.inter": "a"}) is None, "a record that names none"
    file.unlink()
    file.parent.rmdir()
    assert sorted(path.name for path in file.parents[1].iterdir()) == ["Pop-toy-1-2", "Pop-toy-1-3"]


def test_a_classical_model_reads_no_language_model(given: dict[str, Any]) -> None:
    config = LLMConfig("BPR", "tiny", config_dict={key: given[key] for key in ("data_path", "llm_path")})
    assert [*record_inputs(config)] == ["tiny.inter", "tiny.item"]
    assert changed({}, config) == ["tiny.inter", "tiny.item"], "a shared record names none"


def test_a_table_counts_for_the_models_that_load_it(given: dict[str, Any], tmp_path: Path) -> None:
    for suffix in ("user", "kg", "link"):
        (tmp_path / f"data/tiny/tiny.{suffix}").write_text("")

    def read(model: str, **settings: Any) -> list[str]:
        config = LLMConfig(model, "tiny", config_dict={"data_path": given["data_path"], **settings})
        return sorted(Path(name).suffix[1:] for name in record_inputs(config) if name.startswith("tiny."))

    inter, graph = ["user_id", "item_id", "timestamp"], {"kg": ["head_id"], "link": "*"}
    assert read("Pop") == read("TALLRec") == read("Pop", load_col={"inter": inter}) == ["inter", "item"]
    assert read("Pop", load_col={"inter": inter, "user": ["user_id"]}) == ["inter", "item", "user"]
    assert read("Pop", unload_col={"user": ["age"]}) == ["inter", "item", "user"]
    assert read("Pop", load_col=None) == ["inter", "item", "kg", "link", "user"]
    within = {"retriever": "KGAT", "retriever_config": {"load_col": {"inter": inter, **graph}}}
    assert read("Pop", **within) == ["inter", "item", "kg", "link"]


def test_files_that_only_other_rows_of_a_leaderboard_read_do_not_count(given: dict[str, Any]) -> None:
    files = given["candidates"] | {"source": "uniform"}
    data = {"data_path": given["data_path"], "general_datasets": ["other"], "cf_checkpoint": "weights.pth"}
    for model, settings in (
        ("Pop", data),
        ("Pop", data | {"candidates": files}),
        ("Pop", data | {"candidates": given["candidates"], "eval_args": {"mode": "full"}}),
        ("RecentPop", data),
    ):
        assert [*record_inputs(LLMConfig(model, "tiny", config_dict=settings))] == ["tiny.inter", "tiny.item"]
    assert "other.inter" in record_inputs(LLMConfig("LoRACocktail", "tiny", config_dict=data))
    assert "candidates.test" in record_inputs(LLMConfig("Pop", "tiny", config_dict=data | {"candidates": given["candidates"]}))
