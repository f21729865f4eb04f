"""The commands of the README, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    line = [sys.executable, str(ROOT / "run_recbole_llm.py"), *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def table(output: str) -> str:
    """The table of results that ends the log, without the path of the record."""
    return output[output.rindex("tiny, 60 users") :].split("run record:")[0]


def test_the_command_trains_then_keeps_every_stage_and_answers_alike(settings, tmp_path):
    data_path = settings.pop("data_path")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--model=LoRACocktail", "--dataset=tiny", f"--data_path={data_path}", "--config_files=tiny.yaml"]
    first = command(*arguments, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    second = command(*arguments, folder=tmp_path)
    assert second.returncode == 0, second.stderr
    first, second = first.stdout + first.stderr, second.stdout + second.stderr
    for stage in ("base-spirit", "ingredient", "cocktail"):
        assert f"stage {stage}: done in" in first and f"stage {stage}: reused from" not in first
        assert f"stage {stage}: reused from" in second and f"stage {stage}: started" not in second
    assert table(first) == table(second)
    for row in ("LoRACocktail", "uniform mix", "base spirit", "ingredient", "no adapter"):
        assert re.search(rf"^{row} +0\.\d", table(second), re.MULTILINE)


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path):
    done = command("--model=LoRACocktail", "--dataset=tiny", "--lora_learnig_rate=1", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "lora_learning_rate" in errors[0]


def test_help_says_how_to_start_without_loading_anything(tmp_path):
    done = command("--help", folder=tmp_path)
    assert done.returncode == 0 and "--model" in done.stdout and "--dataset" in done.stdout
