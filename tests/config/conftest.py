"""A shell without GPUs, and property files that a test may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.config.property_files import properties_folder

BOARDS = ("leaderboard", "claims", "splits")  # read by commands of their own
PROPERTIES = [file for file in sorted(properties_folder().rglob("*.yaml")) if file.parent.name not in BOARDS]


@pytest.fixture(autouse=True)
def _shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes CUDA_VISIBLE_DEVICES at every Config; put it back afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of properties/ that a test may change."""
    copy = tmp_path / "properties"
    for file in PROPERTIES:
        target = copy / file.relative_to(properties_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text(encoding="utf-8"))
    monkeypatch.setattr("recbole_llm.config.property_files.properties_folder", lambda: copy)
    return copy


def write(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)
