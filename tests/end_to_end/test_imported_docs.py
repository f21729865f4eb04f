"""The scripts of docs/models/imported.md: RecBole's runs on a tiny split and comes back as a row, RecTools' where it is there."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_llm import cli
from recbole_llm.quick_start import run_recbole_llm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models" / "imported.md"


def scripts() -> dict[str, str]:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {"rectools" if "rectools" in block else "recbole": block for block in blocks}


@pytest.fixture
def split(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    own = [f"--{key}={settings[key]}" for key in ("data_path", "checkpoint_dir", "candidates")]
    cli.main(["data", "export", "--dataset=tiny", *own, f"--out={tmp_path / 'split'}"])
    return tmp_path


def run_script(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported(file: Path, settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = run_recbole_llm("Imported", "tiny", config_dict={**settings, "predictions": str(file), **changes})
    return json.loads(Path(found["record"]).read_text())


def test_there_are_two_scripts_and_both_are_python() -> None:
    assert set(scripts()) == {"rectools", "recbole"}
    for name, code in scripts().items():
        compile(code, name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_recboles_own_trainer_hands_its_predictions_back(model: str, split: Path, settings: dict[str, Any]) -> None:
    code = scripts()["recbole"]
    for old, new in (
        ('model="BPR", dataset="ml-100k-split"', f'model="{model}", dataset="tiny-split"'),
        ('"epochs": 40,', '"epochs": 2,' + ('"train_neg_sample_args": None,' if model == "SASRec" else "")),
    ):
        assert old in code
        code = code.replace(old, new)
    run_script(code, split)
    table = pd.read_parquet(split / "recbole.parquet")
    assert len(table) == 60 * 40 and set(table.columns) == {"user_id", "item_id", "score"}
    for protocol in ({}, {"eval_args": {"mode": "full"}}):
        record = imported(split / "recbole.parquet", settings, **protocol)
        assert record["imported"]["remark"] == "" and len(record["ranks"]["Imported"]) == 60


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("rectools") is None, reason="RecTools is not installed")
def test_rectools_hands_its_predictions_back(split: Path, settings: dict[str, Any]) -> None:
    code = scripts()["rectools"].replace("epochs=60, n_factors=64", "epochs=1, n_factors=16").replace("k=50", "k=20")
    run_script(code, split)
    record = imported(split / "rectools-all.parquet", settings)
    assert record["imported"]["missing users"] == 0
    full = imported(split / "rectools-top50.parquet", settings, eval_args={"mode": "full"})
    assert full["imported"]["known items"] == 0
