"""The notebooks of the documentation run from the first cell to the last, with settings that make them short."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = {
    "builtin_lm": {"tokens": 20_000, "hidden_size": 32},
    "train_samples": 64,
    "lora_epochs": 1,
    "lora_batch_size": 8,
    "lora_learning_rate": 5e-2,
    "lr_scheduler_type": "constant",  # every adapter changes something, or it cannot be merged
    "general_samples": 64,
    "general_epochs": 1,
    "domain_min_users": 5,
    "valid_users": 10,
    "merge_prompts": 8,
    "merge_steps": 2,
    "merge_points": 3,
    "merge_beside": {},
    "retriever_config": {"epochs": 1},
}
SHORT = {  # what takes the place of the cell of parameters
    "tour": f"dataset, users, epochs, settings = 'ml-100k', 20, 1, {QUICK}",
    "your-data": f"listeners, settings = 60, {QUICK | {'epochs': 1}}",
    "merge-and-compare": f"readers, rules, shortcuts, settings = 60, ['uniform', 'ties'], False, {QUICK}",
}


def parameters(notebook: dict[str, Any]) -> dict[str, Any]:
    """The one cell of parameters."""
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    return cell


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_output(file: Path) -> None:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert 4 < len(notebook["cells"]) <= 12 and notebook["cells"][0]["cell_type"] == "markdown"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names = {line.split("=")[0].strip() for line in parameters(notebook)["source"] if "=" in line}
    assert names == {name.strip() for name in SHORT[file.stem].split("=")[0].split(",")}


def test_every_notebook_is_run() -> None:
    assert {file.stem for file in NOTEBOOKS} == set(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    parameters(notebook)["source"] = SHORT[name]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert any("text/html" in output.get("data", {}) or "text/markdown" in output.get("data", {}) for output in outputs)
    said = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in said and "Traceback" not in said  # of a command, which does not stop a notebook
    assert len(list(tmp_path.glob("saved/runs/*/record.json"))) >= 2
