"""Scores on disk are a courtesy: those that cannot be read are computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.store import answers, scores
from recbole_llm.store.answers import CachedAnswers
from recbole_llm.store.files import verify
from recbole_llm.store.scores import CachedScores


@pytest.mark.parametrize("kind", [scores, answers])
def test_what_another_process_replaces_while_it_is_read_is_computed_again(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, users = tmp_path / "scores", torch.tensor([3, 1])
    written = CachedScores(folder)
    written.add(users, torch.ones(2, 4))
    written.close()
    assert CachedScores(folder).find(users) is not None
    load: Callable[[Path], Any] = kind.load_state

    def replaced(path: Path) -> Any:
        verify(path)
        shutil.rmtree(path)
        return load(path / "gone")

    monkeypatch.setattr(kind, "load_state", replaced)
    monkeypatch.setattr("recbole_llm.store.files.verify", lambda folder: None)
    assert CachedScores(folder).find(users) is None if kind is scores else 3 not in CachedAnswers(folder)
    assert "again" in caplog.text
