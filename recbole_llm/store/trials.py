"""Trials: a few timed steps of a computation, from which the time of all its steps is predicted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from recbole_llm.store.contexts import holding


@dataclass(frozen=True)
class _Trials:
    seconds: float
    worth: float


_current: ContextVar[_Trials | None] = ContextVar("trials", default=None)


def trials(seconds: float, *, worth: float = 0.0) -> AbstractContextManager[None]:
    """Make trials in this block.

    Args:
        seconds: of each trial.
        worth: guessed seconds of a work below which it has no trial.
    """
    return holding(_current, _Trials(seconds, worth))


def worth_a_trial(guess: float) -> bool:
    """Whether a work of about so many seconds has a trial here."""
    current = _current.get()
    return current is not None and guess >= current.worth


def trial(step: Callable[[], Any], times: int) -> float:
    """The seconds that ``times`` calls of ``step`` take, from some calls after a first one.

    Raises:
        LookupError: there are no trials here; ask :func:`worth_a_trial` before.
    """
    current = _current.get()
    if current is None:
        raise LookupError("a trial outside of trials()")
    step()  # the first call of many functions takes longer
    done, began = 0, time.perf_counter()
    while done < times and (not done or time.perf_counter() - began < current.seconds):
        step()
        done += 1
    return (time.perf_counter() - began) * times / done if done else 0.0
