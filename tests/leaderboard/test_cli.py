"""One command from a property file to a leaderboard, which goes on where it was left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.leaderboard import cli, runner


def write(file: Path, settings: dict[str, Any], **models: Any) -> str:
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "train_batch_size")
    plan = {"dataset": "tiny", "seeds": [1, 2], "settings": {key: settings[key] for key in keys}, "models": models}
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return f"--config_files={file}"


@pytest.mark.slow
def test_a_file_becomes_a_leaderboard_and_a_new_model_is_all_that_is_run_next(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    run = runner.run_process
    monkeypatch.setattr(runner, "run_process", lambda arguments, *rest: started.append(arguments[0]) or run(arguments, *rest))
    file = tmp_path / "mine.yaml"
    with pytest.raises(SystemExit, match="cells that failed: 2"):
        cli.main([write(file, settings, Pop={}, Wrong={"model": "NoSuchModel"}), "--jobs=2"])
    shown = capsys.readouterr().out
    assert "| Pop" in shown and "NoSuchModel: no such model" in shown
    folder = Path(settings["checkpoint_dir"]) / "leaderboard" / "mine"
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".json", ".md", ".csv", ".tex", ".html"}
    (row,) = [row for row in json.loads((folder / "leaderboard.json").read_text())["tables"][0]["rows"] if row["label"] == "Pop"]
    assert row["trained_parameters"] is not None and row["users_per_second"] > 0 and row["peak_memory_bytes"] > 1e7
    assert row["cells"][0]["command"].startswith("python run_recbole_llm.py --model=Pop --dataset=tiny ")

    cli.main([write(file, settings, Pop={}, BPR={"settings": {"epochs": 1}})])
    assert started == ["--model=Pop"] * 2 + ["--model=BPR"] * 2
    assert "| BPR" in capsys.readouterr().out
    capsys.readouterr()
    with pytest.raises(SystemExit, match="cells that failed: 2"):
        cli.main([write(file, settings, Pop={}, Wrong={"model": "NoSuchModel"}, LightGCN={}), "--show"])
    shown = capsys.readouterr().out
    assert len(started) == 4 and "NoSuchModel: no such model" in shown and "seed 1 has not run" in shown


def test_a_mistake_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: --config_files: .*nowhere.yaml does not exist"):
        cli.main([f"--config_files={tmp_path / 'nowhere.yaml'}"])
    with pytest.raises(SystemExit, match="error: command line: 'epochs=3' is not of the form --key=value"):
        cli.main([f"--config_files={tmp_path / 'nowhere.yaml'}", "epochs=3"])
    with pytest.raises(SystemExit, match="error: --params_file: nowhere does not exist"):
        cli.tune(["--model=BPR", "--dataset=tiny", "--params_file=nowhere"])
