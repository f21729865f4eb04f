"""Scores on disk are a courtesy: those that cannot be read are computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    with written.computed():
        written.add(users, torch.ones(2, 4))
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


def test_of_two_runs_that_need_the_same_scores_one_waits_and_reads_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    users = torch.tensor([3, 1])
    first, second = CachedScores(tmp_path / "scores"), CachedScores(tmp_path / "scores")

    def read() -> tuple[float, torch.Tensor | None]:
        with second.computed() as waited:
            return waited, second.find(users)

    caplog.set_level("INFO")
    with ThreadPoolExecutor(1) as pool:
        with first.computed() as waited:
            assert waited == 0 and not second.is_free
            other = pool.submit(read)
            while "waiting" not in caplog.text:
                assert not other.done()
            first.add(users, torch.ones(2, 4))
        waited, scores = other.result()
    assert waited > 0 and scores is not None and scores.tolist() == [[1.0] * 4] * 2 and second.found
    assert CachedScores(tmp_path / "scores").is_free


def test_scores_of_a_failed_evaluation_are_not_written(tmp_path: Path) -> None:
    scores = CachedScores(tmp_path / "scores")
    with pytest.raises(RuntimeError), scores.computed():
        scores.add(torch.tensor([3]), torch.ones(1, 4))
        raise RuntimeError
    assert scores.is_free and CachedScores(tmp_path / "scores").find(torch.tensor([3])) is None
