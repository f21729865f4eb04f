"""Trials: how often a step runs, and what its time predicts."""

from __future__ import annotations

import pytest

from recbole_llm.store import trials as module
from recbole_llm.store.trials import trial, trials, worth_a_trial


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_the_first_call_does_not_count(clock: list[float]) -> None:
    durations = iter([100.0, *[1.0, 3.0] * 10])
    called = []

    def step() -> None:
        called.append(None)
        clock[0] += next(durations)

    with trials(4.0):
        assert trial(step, 50) == pytest.approx(50 * 2)  # the mean of the calls within four seconds
    assert len(called) == 3


def test_no_more_calls_than_there_are_and_at_least_one(clock: list[float]) -> None:
    def step() -> None:
        clock[0] += 10

    with trials(1.0):
        assert trial(step, 7) == 70 and trial(step, 0) == 0
    with trials(1000.0):
        assert trial(step, 3) == 30


def test_there_are_no_trials_outside() -> None:
    assert not worth_a_trial(1e9)
    with trials(1.0, worth=60):
        assert worth_a_trial(60) and not worth_a_trial(59)
    with pytest.raises(LookupError, match="outside"):
        trial(lambda: None, 1)
