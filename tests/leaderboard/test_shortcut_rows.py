"""A leaderboard that is run: the shortcuts stand in it with one seed, and the other rows have a headroom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.board import make_leaderboard
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import SHORTCUTS


@pytest.mark.slow
def test_a_leaderboard_has_the_shortcuts_and_says_how_far_the_others_are_above(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(arguments: list[str], *_: Any) -> None:
        values = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        model, dataset = values.pop("model"), values.pop("dataset")
        run_recbole_llm(model, dataset, cmd_line=[f"--{key}={value}" for key, value in values.items()])

    monkeypatch.setattr(runner, "run_process", run_here)
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "builtin_text_encoder")
    file = tmp_path / "mine.yaml"
    models = {"Pop": {}, "BPR": {"settings": {"epochs": 1}}}
    plan = {"dataset": "tiny", "seeds": [1, 2], "settings": {key: settings[key] for key in keys}, "models": models}
    file.write_text(yaml.safe_dump(plan))
    leaderboard, files = make_leaderboard(file, {})
    assert not leaderboard.failed
    (table,) = leaderboard.tables
    rows = {row.label: row for row in table.rows}
    assert {label for label, row in rows.items() if row.shortcut} == {*SHORTCUTS} and len(rows) == 7
    assert all(row.seeds == ([1] if row.shortcut else [1, 2]) for row in table.rows)
    best = table.shortcuts[0]
    assert best.label == "TransitionGraph"  # in ``tiny``, item i is mostly followed by item i + 1
    for label in models:
        assert rows[label].headroom == pytest.approx(rows[label].metrics["hit@1"] - best.metrics["hit@1"])
        assert rows[label].headroom < 0 and rows[label].headroom_p == rows[label].p_values[best.label] < 0.001
    assert rows["NearestTexts"].backbone and leaderboard.tests == 21
    shown = json.loads(files[0].read_text())["tables"][0]["rows"]
    assert {row["label"] for row in shown if row["shortcut"]} == {*SHORTCUTS}
