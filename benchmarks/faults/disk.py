"""Disks that are full, read-only or forbidden from the k-th write on, or that take no more than some bytes of a file."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from faults.world import Outcome, World, record

MODELS = ("Pop", "BPR", "TALLRec", "LoRACocktail", "Laser")
ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "no permission": errno.EACCES, "an error of the device": errno.EIO}
BYTES = (0, 100, 1000, 4000, 20_000, 100_000)  # of RLIMIT_FSIZE
ONE_LINE, SURVIVED, LOST = "one line", "survived", "lost"
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def failing(number: int, code: int, below: Path, counter: Path | None = None) -> Callable[[], None]:
    """Let every opening for writing, new folder and rename below a folder fail from the ``number``-th on, in this process.

    Args:
        counter: a file that says afterwards how many there were.
    """
    calls = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event not in ("open", "os.mkdir", "os.rename"):
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or (event == "open" and not (arguments[2] or 0) & _CHANGES):
            return
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(f"{below}{os.sep}") or full == str(counter):
            return
        calls += 1
        if counter is not None:
            counter.write_text(str(calls))
        if number and calls >= number:
            raise OSError(code, os.strerror(code), os.fsdecode(path))

    return lambda: sys.addaudithook(hook)


def small_files(size: int) -> Callable[[], None]:
    """Let no file of this process become larger than ``size`` bytes; writers of every library meet this."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG, then
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def judged(outcome: Outcome, found: Any, expected: Any) -> str:
    """How a run ended whose disk failed."""
    if outcome.code == 0:
        return SURVIVED if found == expected else LOST
    return ONE_LINE if outcome.error and "bug in the package" not in outcome.error else LOST


def section(
    folder: Path, *, most: int = 30, models: tuple[str, ...] = MODELS, seed: int = 0, until: float = math.inf
) -> dict[str, Any]:
    """At most ``most`` failing disks of each sort and model, in random order; none begins after ``until``."""
    world = World(folder)
    world.warm()
    counts: dict[str, Counter[str]] = {}
    lost: list[str] = []
    faults: list[tuple[str, str, int, Callable[[], None]]] = []
    expected = {}
    for model in models:
        counter = folder / f"{model}.count"
        _, _, expected[model] = world.whole(model, failing(0, 0, folder / model, counter))
        own, writes = folder / model / "own", int(counter.read_text())
        for k in range(1, writes + 1, max(1, -(-writes // most))):
            faults += [(model, name, k, failing(k, code, own)) for name, code in ERRORS.items()]
        faults += [(model, "files may not grow", size, small_files(size)) for size in BYTES]
    Random(seed).shuffle(faults)
    for model, name, k, before in faults:
        if time.monotonic() > until:
            break
        saved = folder / model / "own" / "saved"
        saved.parent.mkdir(parents=True)
        outcome = world.run(world.arguments(model, saved), saved.parent, before)
        found = judged(outcome, record(saved) if outcome.code == 0 else None, expected[model])
        again = world.run(world.arguments(model, saved), saved.parent)
        same = again.code == 0 and record(saved) == expected[model]
        counts.setdefault(name, Counter()).update([found, "again" if same else "not again"])
        if found == LOST or not same:
            lost.append(f"{model}, {name} from {k} on: {outcome.end if found == LOST else f'afterwards {again.end}'}")
            print(lost[-1], flush=True)
        shutil.rmtree(saved.parent)
    rows = [
        [name, sum(own[key] for key in (ONE_LINE, SURVIVED, LOST)), own[ONE_LINE], own[SURVIVED], own[LOST], own["again"]]
        for name, own in sorted(counts.items())
    ]
    total = [sum(row[place] for row in rows) for place in range(1, 6)]
    return {
        "part": "disk",
        "title": "Failing disks",
        "columns": ["disk", "runs", "ended in one line", "survived", "lost", "same command afterwards: equal record"],
        "rows": [*rows, ["all", *total]],
        "notes": [
            "The disk of a run fails from its k-th opening for writing, new folder or rename on, for k from the first to the "
            f"last; models: {', '.join(models)}. In *files may not grow*, no file becomes larger than "
            f"{', '.join(f'{size:,}' for size in BYTES)} bytes, which writers of every library meet.",
            "One line: exit code 2, what failed, where, and how to go on. Survived: only a courtesy could not be written, and "
            "the record is equal. Lost: a traceback, another result, or an error without a remedy.",
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": total[3] + total[0] - total[4],
    }
