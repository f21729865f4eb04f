"""A run in two processes ends as that in one, with equal ranks for equal weights; also after the death of one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several import exit_codes, start

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.files import sha256_file

pytestmark = pytest.mark.slow

NO_DRAWS = {"lora_dropout": 0.0, "m_former_dropout": 0.0}
CLASSICAL = {"train_mode": "sequence", "epochs": 2, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}
SMALL_LM = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 2000, "batch_tokens": 256, "vocab_size": 300}
MODELS: dict[str, dict[str, Any]] = {
    "LoRACocktail": {},
    "MoLoRec": {},
    "WeaveRec": {},
    "TALLRec": {"llm_path": "builtin", "builtin_lm": SMALL_LM},
    "LlamaRec": {},
    "ALLMRec": {},
    "Laser": {"warmup_epochs": 1},
    "AlphaRec": {},
    "Cascade": {},
    "SASRec": CLASSICAL,
    "GRU4Rec": {**CLASSICAL, "loss_type": "BPR"},
    "BERT4Rec": CLASSICAL,
}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of weights after all steps; that of the gradients of one step is 1e-5


def changed(settings: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Settings for a model without random draws in training, so that one process and two compute the same."""
    own = (
        {key: MODELS[model].get(key, value) for key, value in NO_DRAWS.items()}
        if model not in ("SASRec", "GRU4Rec", "BERT4Rec")
        else {}
    )
    cf = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    inner = {key: {**settings[key], **cf} for key in ("cf_config", "cheap_config")}
    return {**settings, **inner, **own, **MODELS[model], "use_gpu": False, "checkpoint_dir": str(folder)}


def record_of(settings: dict[str, Any]) -> dict[str, Any]:
    (file,) = Path(settings["checkpoint_dir"]).glob("runs/*/record.json")
    return json.loads(file.read_text())


def weights(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of all stages, by file."""
    root = Path(settings["checkpoint_dir"])
    files = [*root.glob("stages/**/*.safetensors")]
    return {str(file.relative_to(root)): load_file(file) for file in files if "/." not in str(file)}


def run(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    run_recbole_llm(model, "tiny", config_dict=settings)
    return record_of(settings)


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_end_as_one(model: str, settings: dict[str, Any], tmp_path: Path) -> None:
    one, two, again = (changed(settings, model, tmp_path / name) for name in ("one", "two", "again"))
    expected = run(model, one)
    assert exit_codes(start(lambda: run_recbole_llm(model, "tiny", config_dict=two))) == [0, 0]
    found = record_of(two)
    assert found["processes"] == 2 and expected["processes"] == 1
    assert weights(one).keys() == weights(two).keys()
    for file, tensors in weights(one).items():
        torch.testing.assert_close(weights(two)[file], tensors, **TOLERANCE, msg=lambda text, file=file: f"{file}: {text}")
    assert found["ranks"] == expected["ranks"] and found["results"] == expected["results"]
    assert found["best_valid_result"] == expected["best_valid_result"]
    assert all(len(ranks) == len({*ranks}) for ranks in found["ranks"].values())
    if (tmp_path / "one" / "stages").is_dir() and model != "AlphaRec":
        # the same weights: the scores of two processes are those of one to the bit
        shutil.copytree(tmp_path / "one" / "stages", tmp_path / "again" / "stages")
        assert exit_codes(start(lambda: run_recbole_llm(model, "tiny", config_dict=again))) == [0, 0]
        assert record_of(again)["ranks"] == expected["ranks"] and set(record_of(again)["stage_seconds"].values()) == {0.0}
        for file in (tmp_path / "one").glob("scores/*/tensors.safetensors"):
            assert sha256_file(file) == sha256_file(tmp_path / "again" / file.relative_to(tmp_path / "one"))
