"""A model's result follows from its own seed: not from what was cached, nor from what ran before it in the process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import MODELS
from tests.conftest import assembled

OWN: dict[str, dict[str, Any]] = {
    "LlamaRec": {"lora_train_mode": "prefix"},
    "Laser": {"warmup_epochs": 1},
    "Cascade": {"llm_ranker": "TALLRec"},
    "MoLoRec": {"merge_learning_rate": [0.5, 1.0]},
}
SHORT = {key: 1 for key in ("lora_epochs", "general_epochs", "phase1_epochs", "stage1_epochs", "stage2_epochs")}
LAST = {  # what has to be computed again where everything else is cached
    "ALLMRec": "projection",
    "AlphaRec": None,
    "Cascade": "routing",
    "Laser": "phase-2",
    "LlamaRec": "verbalizer",
    "LoRACocktail": "cocktail",
    "MoLoRec": "cocktail",
    "TALLRec": "ingredient",
    "WeaveRec": "weave",
}


def _run(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    done = run_recbole_llm(name, "tiny", config_dict={**settings, **OWN.get(name, {}), "checkpoint_dir": str(folder)})
    return json.loads(Path(done["record"]).read_text())


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("results", "ranks", "tie_rate", "half_width_95", "best_valid_result", "merge")}


DEAR = ("TALLRec", "LoRACocktail", "MoLoRec", "WeaveRec", "ALLMRec", "Cascade", "Laser", "LlamaRec")  # several trainings each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEAR)) for name in [*MODELS, "SASRec", "BPR"]]
)
def test_one_seed_gives_one_result_whatever_was_cached_or_ran_before(
    name: str, module_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, last, settings = tmp_path / "first", LAST.get(name), {**module_settings, **SHORT}
    first = _run(name, settings, folder)
    assert all(first["stage_seconds"].values())

    torch.rand(7)
    second = _run(name, settings, folder)
    assert not any(second["stage_seconds"].values())
    assert _numbers(second) == _numbers(first)

    for cached in ("scores", "text_vectors", "candidates"):
        shutil.rmtree(folder / cached, ignore_errors=True)
    if last:
        shutil.rmtree(folder / "stages" / first["stages"][last])
    upstream = _run(name, settings, folder)
    assert [stage for stage, seconds in upstream["stage_seconds"].items() if seconds] == ([last] if last else [])
    assert _numbers(upstream) == _numbers(first)

    other = assembled("LightGCN", settings, checkpoint_dir=str(tmp_path / "other"), epochs=1)
    other.trainer.fit(other.train, other.valid)
    fresh = _run(name, settings, tmp_path / "fresh")
    assert all(fresh["stage_seconds"].values()) and fresh["stages"] == first["stages"]
    assert _numbers(fresh) == _numbers(first)


@pytest.mark.slow
def test_scores_of_shorter_histories_are_not_those_of_longer_ones(module_settings: dict[str, Any], tmp_path: Path) -> None:
    """``MAX_ITEM_LIST_LENGTH`` cuts the histories of the test, and those of the training and of its validation with them."""
    short = _run("TALLRec", {**module_settings, "MAX_ITEM_LIST_LENGTH": 1}, tmp_path / "shared")
    shared, fresh = (
        _run("TALLRec", {**module_settings, "MAX_ITEM_LIST_LENGTH": 9}, tmp_path / name) for name in ("shared", "fresh")
    )
    assert shared["stages"] == fresh["stages"] != short["stages"]
    assert _numbers(shared) == _numbers(fresh) and shared["ranks"] != short["ranks"]
