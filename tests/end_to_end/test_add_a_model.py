"""The models of docs/add-a-model.md run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import run_recbole_llm

ROOT = Path(__file__).parents[2]
MODEL, BARE, TEST = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/add-a-model.md").read_text(), re.MULTILINE | re.DOTALL)
SETTINGS, BOARD = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/add-a-model.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the files of the page."""
    for name, text in {"my_model.py": MODEL, "MyModel.yaml": SETTINGS, "bare.py": BARE, "mine.yaml": BOARD}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_own", {})
    for module in ("my_model", "bare"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def test_it_has_at_most_30_lines() -> None:
    assert len([line for line in MODEL.splitlines() if line.strip()]) <= 30


def test_the_model_of_the_page_has_its_rows(own_models: Path, settings: dict[str, Any]) -> None:
    result = run_recbole_llm("my_model:MyModel", "tiny", config_dict=settings)
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["MyModel", "LoRA alone", "no adapter"]
    assert record["ranks"]["LoRA alone"] != record["ranks"]["no adapter"]
    assert record["config"]["popularity_weight"] == 0.1 and list(record["stage_seconds"]) == ["my-lora"]

    for weight in (0.0, 10.0):  # a weight of .1 may change no rank of these few users
        result = run_recbole_llm("my_model:MyModel", "tiny", config_dict={**settings, "popularity_weight": weight})
        again = json.loads(Path(result["record"]).read_text())
        assert again["stage_seconds"] == {"my-lora": 0.0}, "no stage depends on the weight"
        assert (again["ranks"]["MyModel"] == record["ranks"]["LoRA alone"]) == (weight == 0)


def test_a_value_of_another_type_is_refused(own_models: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="popularity_weight: 'much' in config_dict is not a number"):
        run_recbole_llm("my_model:MyModel", "tiny", config_dict={**settings, "popularity_weight": "much"})


def test_the_bare_lm_of_the_page_trains_nothing(own_models: Path, settings: dict[str, Any]) -> None:
    result = run_recbole_llm("bare:BareLM", "tiny", config_dict=settings)
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["BareLM"] and not record["stage_seconds"] and not record["trained_parameters"]


def test_a_model_of_recboles_kind_is_trained_by_its_trainer(own_models: Path, settings: dict[str, Any]) -> None:
    (own_models / "plain.py").write_text(
        "from recbole.model.sequential_recommender.sasrec import SASRec\n\n\nclass Mine(SASRec):\n    pass\n"
    )
    given = {**settings, "n_layers": 1, "hidden_size": 8, "inner_size": 8, "loss_type": "CE", "train_mode": "prefix"}
    ours, theirs = (
        json.loads(Path(run_recbole_llm(name, "tiny", config_dict=given)["record"]).read_text())
        for name in ("plain.py:Mine", "SASRec")
    )
    assert list(ours["results"]) == ["Mine"] and ours["candidates_sha256"]["test"]
    assert ours["ranks"]["Mine"] == theirs["ranks"]["SASRec"], "it has the settings of the model that it extends"


@pytest.mark.parametrize(
    ("module", "base"),
    [
        ("recbole_llm.model.allmrec", "ALLMRec"),
        ("recbole_llm.model.cascade", "Cascade"),
        ("recbole_llm.model.molorec", "MoLoRec"),
        ("recbole.model.general_recommender", "LightGCN"),
    ],
)
@pytest.mark.parametrize("own", ["", "# own file\nown_weight: 0.5  # (float) of the child\nlearning_rate: 0.125\n"])
def test_a_model_has_the_settings_of_the_model_that_it_extends(own: str, module: str, base: str, own_models: Path) -> None:
    (own_models / "child.py").write_text(f"from {module} import {base}\n\n\nclass Child({base}):\n    pass\n")
    if own:
        (own_models / "Child.yaml").write_text(own)
    sys.modules.pop("child", None)
    given = {"llm": "smollm2-135m"}
    child, parent = (LLMConfig(name, "ml-100k", config_dict=given).final_config_dict for name in ("child:Child", base))
    changed = {key: child[key] for key in child if key not in parent or child[key] != parent[key]}
    assert changed == {"model": "Child", **({"own_weight": 0.5, "learning_rate": 0.125} if own else {})}
    assert {*parent} <= {*child}


def test_a_model_cannot_take_the_name_of_another(own_models: Path) -> None:
    (own_models / "theirs.py").write_text("class SASRec: pass\n")
    with pytest.raises(ValueError, match="--model=theirs:SASRec: SASRec is a model of .* give yours another name"):
        registry.get_model("theirs:SASRec")


@pytest.mark.slow
def test_the_test_of_the_page_passes(own_models: Path) -> None:
    (own_models / "test_my_model.py").write_text(TEST)
    done = python("-m", "pytest", "-q", "test_my_model.py", folder=own_models)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_leaderboard_shows_the_model_and_its_variant(own_models: Path, settings: dict[str, Any]) -> None:
    board = BOARD.replace("ml-100k\n", "tiny\n").replace(", 2021, 2022", "").replace("  TALLRec: {}\n", "")
    (own_models / "mine.yaml").write_text(board + "shortcuts: False\n")
    keys = [f"--{key}={value}" for key, value in settings.items() if key != "show_progress"]
    done = python("-m", "recbole_llm.cli", "leaderboard", "--config_files=mine.yaml", *keys, folder=own_models)
    assert done.returncode == 0, done.stderr
    for row in ("SASRec", "LoRA + popularity", "my LoRA"):
        assert re.search(rf"\| {re.escape(row)} +\|.*\| +[\d*.]*0\.\d", done.stdout), done.stdout


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
