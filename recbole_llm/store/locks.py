"""One writer of a file or folder at a time; who waits says for whom."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

from filelock import FileLock, Timeout

logger = getLogger()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[float]:
    """Hold the lock of ``path``, which its folder contains as a hidden file; yields the seconds of waiting.

    The operating system releases the lock of a process that ends, however it ends.

    Args:
        what: what is written, for the log of a process that waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(path.with_name(f".{path.name}.lock")), path.with_name(f".{path.name}.owner")
    waited = 0.0
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info(f"{what}: waiting for {_read(owner)}, which writes {path}")
        began = time.monotonic()
        lock.acquire()
        waited = time.monotonic() - began
    try:
        with contextlib.suppress(OSError):  # a full disk: the name of the owner is a courtesy
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield waited
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Try to hold the lock of ``path``, as :func:`locked`, without waiting; yields whether this process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read(owner: Path) -> str:
    try:
        return " ".join(owner.read_text(encoding="utf-8", errors="replace").split())[:200] or "another process"
    except OSError:
        return "another process"
