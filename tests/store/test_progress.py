"""Without a terminal, progress is told in lines of the log, ever less often."""

from __future__ import annotations

import logging

import pytest

from recbole_llm.store import progress
from recbole_llm.store.costs import Tokens, count, metered, unmetered
from recbole_llm.store.progress import progress_bar, shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_said", 0.0)
    return now


def test_lines_name_stage_place_and_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_bar("ingredient", 100) as bar:
        for clock[0] in (10.0, 20.0):
            bar.advance(5, loss=2.5)
    assert caplog.messages == ["ingredient: 10/100, loss 2.500, 180 s left"]


def test_an_hour_takes_fifty_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_bar("ingredient", 3600) as bar:
        for second in range(3600):
            clock[0] = float(second)
            bar.advance()
    assert 30 < len(caplog.messages) < 50


def test_news_are_lines_too_unless_nothing_is_to_be_shown(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for show in (True, False):
        with progress_bar("leaderboard", 4, show=show) as bar:
            for _ in range(20):
                clock[0] += 1
                bar.tell("SASRec: epoch 3")
    assert caplog.messages == ["leaderboard: 0/4, SASRec: epoch 3"]


def test_a_share_of_planned_work_is_told_where_the_bars_inside_are_silent(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with metered() as measured, shown("stage ingredient", measured, 1000):
        with progress_bar("ingredient", 4) as inner:
            for clock[0] in (20.0, 40.0):
                count(Tokens(fed=60), trained=True)
                count(Tokens(fed=20), trained=False)
                inner.advance()
        with unmetered():
            count(Tokens(fed=60), trained=True)
        for clock[0] in range(50, 100, 10):  # a validation
            count(Tokens(fed=100), trained=False)
        clock[0] = 140.0
        count(Tokens(fed=300), trained=False)  # more than was planned
    assert caplog.messages == [
        "ingredient: 1/4, 60 s left",
        "ingredient: 2/4, 40 s left",
        "stage ingredient: 80%, 20 s left",
        "stage ingredient: 100%, 0 s left",
    ]


def test_nothing_is_told_of_work_that_is_not_planned(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with metered() as measured, shown("stage ingredient", measured, 0):
        clock[0] = 100.0
        count(Tokens(fed=100), trained=False)
    assert not caplog.messages
