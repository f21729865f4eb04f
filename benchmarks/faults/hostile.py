"""Hostile files and command lines: each is read, or refused by an error that was raised for the user, in bounded time."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from faults import inputs
from faults.world import World

MOST_SECONDS = 30  # of processor time, for one input; a hostile file could cost hours


@dataclass
class Tried:
    """What became of the inputs of a kind."""

    counts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    slowest: Any = None


def tried(strategy: st.SearchStrategy[Any], read: Callable[[Any], Any], number: int, seed: int = 0) -> Tried:
    """Read ``number`` inputs, the same ones each time for a seed.

    Raises:
        Exception: what an input raised that is no error for the user; hypothesis shows the smallest such input.
    """
    found = Tried()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
    )
    @hypothesis.given(strategy)
    def one(value: Any) -> None:
        began = time.process_time()  # the first input imports what reads it, which takes long beside other work
        try:
            read(value)
        except (ValueError, OSError, ImportError) as error:
            check_refusal(error)
            found.counts["refused"] += 1
        else:
            found.counts["read"] += 1
        took = time.process_time() - began
        assert took < MOST_SECONDS, f"{took:.0f} s"
        if took > found.longest:
            found.longest, found.slowest = took, value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            one()
        finally:
            logging.disable(logging.NOTSET)
    return found


def check_refusal(error: Exception) -> None:
    """Whether the command line would end in one line of this error's own words, without a word of a fault of the package."""
    from recbole_llm.cli.errors import was_raised_here

    if isinstance(error, (OSError, ImportError)) or was_raised_here(error):
        assert str(error).strip(), "an error without a word"
        return
    raise error


def section(folder: Path, *, number: int = 500, seed: int = 0, until: float = math.inf) -> dict[str, Any]:
    """Try ``number`` inputs of each kind; none begins after ``until``."""
    world = World(folder)
    rows, lost = [], []
    for name, make in inputs.KINDS.items():
        if time.monotonic() > until:
            break
        strategy, read = make(world)
        began = time.process_time()
        try:
            found = tried(strategy, read, number, seed)
        except Exception as error:
            lost.append(f"{name}: {type(error).__name__}: {error}")
            rows.append([name, None, None, None, None, 1])
            continue
        counts = found.counts
        rows.append([name, sum(counts.values()), counts["read"], counts["refused"], round(found.longest, 2), 0])
        print(f"{name}: {dict(counts)}, longest {found.longest:.2f} s, all {time.process_time() - began:.0f} s", flush=True)
    return {
        "part": "hostile",
        "title": "Hostile inputs",
        "columns": ["kind of input", "inputs", "read", "refused by name", "processor seconds of the slowest", "lost"],
        "rows": rows,
        "notes": [
            "Made by hypothesis: sound files whose parts are replaced, files of fragments that are syntax of their kind, bytes.",
            "Refused by name: an error that was raised for the user, which the command line shows as one line with exit code 2. "
            f"Lost: any other exception, or more than {MOST_SECONDS} s of processor time; a kind ends with its first loss.",
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": len(lost),
    }
