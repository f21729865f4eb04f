"""The settings of a run that another one is initialised from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.model.allmrec import ALLMRec
from recbole_llm.model.tallrec import TALLRec
from tests.config.conftest import write


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``kept(**given)``: the folder of a run on ml-100k with these settings, which TALLRec and ALLMRec may take up."""
    for model_class in (TALLRec, ALLMRec):
        monkeypatch.setattr(model_class, "supports_init_from", True, raising=False)

    def kept(stages: dict[str, str] | None = None, name: str = "run", model: str = "TALLRec", **given: Any) -> str:
        folder = tmp_path / "saved" / "runs" / name
        folder.mkdir(parents=True)
        config = LLMConfig(model, "ml-100k", config_dict=given).plain()
        record = {"model": model, "dataset": "ml-100k", "config": config, "stages": stages or {}}
        (folder / "record.json").write_text(json.dumps(record))
        return str(folder)

    return kept


def test_settings_of_a_kept_run_win_over_files_and_yours_over_these(kept: Any, tmp_path: Path) -> None:
    texts = {"system": "'[1]'", "prompts": {"own": "{history}"}}  # text stays text
    run = kept(r=3, llm="qwen2.5-0.5b", lora_epochs=9, max_history=7, builtin_lm={"tokens": 5}, top_k_target=2, **texts)
    config = LLMConfig("TALLRec", "tiny", [write(tmp_path / "own.yaml", r=4)], {"init_from": run}, ["--lora_epochs=8"])
    assert config.init_run is not None and config.init_run.root == tmp_path / "saved"
    assert (config["r"], config["lora_epochs"], config["max_history"], config["top_k_target"]) == (4, 8, 7, 2)
    assert (config["llm"], config["llm_path"], config["lora_batch_size"]) == ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 128)
    assert config["system"] == "[1]" and {"own", "listwise"} < config["prompts"].keys() and config["builtin_lm"]["tokens"] == 5
    other = config.for_dataset("amazon-beauty")
    assert (other["r"], other["lora_epochs"], other["max_history"], other["noun"]) == (4, 8, 7, "product")
    assert config.for_model("SASRec", {}).init_run is None


def test_what_a_kept_run_says_about_its_data_and_measurement_is_left_to_it(kept: Any) -> None:
    about_data = {
        "candidates": {"num_negatives": 3, "seed": 1},
        "eval_users": 5,
        "slices": {},
        "metrics": ["Hit", "NDCG"],
        "topk": [5],
        "valid_metric": "NDCG@5",
        "eval_args": {"mode": "full"},
        "eval_batch_size": 7,
        "metric_decimal_place": 3,
        "new_items": 0.2,
        "cold_user_length": 4,
        "retriever": "BPR",
        "retriever_config": {"epochs": 1},
        "retriever_top": 3,
        "title_field": "t",
        "year_field": "y",
        "brand_field": "b",
        "category_field": "c",
        "no_value": ["x"],
        "noun": "n",
        "article_suffix": False,
        "verb": "v",
        "load_col": {"inter": ["user_id"]},
        "show_progress": False,
        "seed": 3,
        "save_every_seconds": 1.0,
        "checkpoint_dir": "there",
        "data_path": "there",
        "cf_checkpoint": "there",
    }
    run = kept(model="ALLMRec", max_history=7, **about_data)
    own, taken = (LLMConfig("ALLMRec", "amazon-beauty", config_dict={"init_from": given}) for given in (None, run))
    changed = {key for key, value in taken.plain().items() if value != own.plain()[key]}
    assert changed == {"max_history", "init_from"}


@pytest.mark.parametrize("llm", [None, "builtin"])
def test_a_backbone_beside_a_kept_run_is_refused_unless_it_is_that_runs(kept: Any, llm: str | None) -> None:
    run = kept(llm=llm)
    for given in ({}, {"llm": "builtin"}, {"llm_path": "here"}):
        config = LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, **given})
        assert config["llm_path"] == given.get("llm_path", "builtin")
    with pytest.raises(ValueError, match="--llm=qwen2.5-0.5b: init_from=.* was trained on builtin; remove llm"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "qwen2.5-0.5b"})
    run = kept(llm_path="there", name="another")
    with pytest.raises(ValueError, match="--llm=builtin: init_from=.* was trained on there; remove llm"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run, "llm": "builtin"})


def test_only_some_models_use_runs_and_only_their_own(kept: Any) -> None:
    run = kept()
    for model in ("LoRACocktail", "SASRec"):
        with pytest.raises(ValueError, match=f"init_from: {model} cannot be initialised from a run; remove init_from=.*run"):
            LLMConfig(model, "tiny", config_dict={"init_from": run})
    file = Path(run) / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": "Laser"}))
    with pytest.raises(ValueError, match="init_from: .*run is a run of Laser; give a run of TALLRec"):
        LLMConfig("TALLRec", "tiny", config_dict={"init_from": run})
    with pytest.raises(ValueError, match="init_from: there is no run at nowhere"):
        LLMConfig("TALLRec", "tiny", cmd_line=["--init_from=nowhere"])
    assert LLMConfig("SASRec", "tiny", config_dict={"init_from": None}).init_run is None


def test_a_fingerprint_follows_what_a_kept_run_has_trained_not_where_it_lies(kept: Any) -> None:
    def fingerprint(run: str | None) -> str:
        return LLMConfig("TALLRec", "tiny", config_dict={"init_from": run}).fingerprint

    run = kept({"lm": "lm-1"})
    assert fingerprint(run) == fingerprint(f"{run}/record.json") == fingerprint(kept({"lm": "lm-1"}, name="again"))
    assert len({fingerprint(None), fingerprint(run), fingerprint(kept({"lm": "lm-2"}, name="other"))}) == 3
