"""Progress bars with the stage's name and the time left; plain lines where nobody watches a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from logging import getLogger
from typing import Any

from torch import Tensor
from tqdm import tqdm

logger = getLogger()


class _Bar:
    def __init__(self, name: str, total: int, start: int, live: bool, quiet: bool):
        self._name, self._total, self._done, self._quiet = name, total, start, quiet
        self._live = tqdm(total=total, initial=start, desc=name, ncols=100, leave=False) if live else None
        self._began, self._first, self._logged = time.monotonic(), start, time.monotonic()

    def advance(self, amount: int = 1, loss: Tensor | float | None = None) -> None:
        self._done += amount
        if self._live is not None:
            if loss is not None:
                self._live.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            self._live.update(amount)
        elif not self._quiet and time.monotonic() - self._logged > 15:
            self._log(loss)

    def _log(self, loss: Tensor | float | None) -> None:
        self._logged = time.monotonic()
        left = (self._logged - self._began) / max(self._done - self._first, 1) * (self._total - self._done)
        shown = "" if loss is None else f", loss {float(loss):.3f}"
        logger.info(f"{self._name}: {self._done}/{self._total}{shown}, {left:.0f} s left")

    def close(self) -> None:
        if self._live is not None:
            self._live.close()


@contextlib.contextmanager
def progress_bar(name: str, total: int, *, start: int = 0, show: bool = True) -> Iterator[Any]:
    """A bar with ``advance(amount, loss)``: live on a terminal, else a log line every 15 s."""
    bar = _Bar(name, total, start, live=show and sys.stderr.isatty(), quiet=not show)
    try:
        yield bar
    finally:
        bar.close()
