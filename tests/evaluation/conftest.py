"""Runs of a few models on ``tiny``, made once and shared by the tests of this folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.quick_start import run_recbole_llm

Run = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="session")
def run(data_path: Path, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(model, **settings)`` -> result dict and run record; the same call again is not run again."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Any] = {}

    def run(model: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        key = json.dumps([model, values], sort_keys=True, default=str)
        if key not in done:
            settings = {
                "data_path": str(data_path),
                "checkpoint_dir": str(folder / str(len(done))),
                "show_progress": False,
                "epochs": 1,
                "train_batch_size": 64,
                "candidates": {"num_negatives": 9},
                "topk": [1, 5],
                "valid_metric": "NDCG@5",
                "llm_path": str(tiny_lm),
                "train_samples": 16,
                "lora_epochs": 1,
                "lora_batch_size": 8,
                "r": 4,
                "max_history": 5,
                "valid_users": 10,
                "prompt": "history",
                "lora_train_mode": "sequence",
                "train_positions": "all",
                "general_positions": "all",
            }
            before = Path.cwd()
            os.chdir(folder)
            try:
                result = run_recbole_llm(model, "tiny", config_dict={**settings, **values})
            finally:
                os.chdir(before)
            done[key] = result, json.loads(Path(result["record"]).read_text())
        return done[key]

    return run
