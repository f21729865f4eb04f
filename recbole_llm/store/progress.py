"""Progress bars on a terminal, and log lines elsewhere: every 15 s at first, then less often, so that a long log stays short."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from logging import getLogger

from torch import Tensor
from tqdm import tqdm

from recbole_llm.store.costs import Measured, watched
from recbole_llm.store.processes import current

logger = getLogger()
_said = 0.0  # when a bar has last written a line of the log


class Bar:
    """Made by :func:`progress_bar`."""

    def __init__(self, name: str, total: int, bar: tqdm, logs: bool):
        self._name, self._total, self._bar, self._logs = name, total, bar, logs
        self._start = self._done = bar.n
        self._began = self._logged = time.monotonic()

    def advance(self, amount: int = 1, loss: Tensor | float | None = None) -> None:
        self._done += amount
        if not self._bar.disable:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            self._bar.update(amount)
        elif self._due():
            left = (self._logged - self._began) / max(self._done - self._start, 1) * (self._total - self._done)
            shown = "" if loss is None else f", loss {float(loss):.3f}"
            logger.info(f"{self._name}: {self._done}/{self._total}{shown}, {left:.0f} s left")

    def reach(self, done: int) -> None:
        """Show how much of the total is done; in a log, only if no bar inside this one has written a line for a while."""
        done = min(done, self._total)
        if not self._bar.disable:
            self._bar.update(done - self._done)
        elif self._due(silence=True):
            left = (self._logged - self._began) / max(done, 1) * (self._total - done)
            logger.info(f"{self._name}: {done / self._total:.0%}, {left:.0f} s left")
        self._done = done

    def tell(self, news: str) -> None:
        """Show what is under way."""
        if not self._bar.disable:
            self._bar.bar_format = "{desc}: {n_fmt}/{total_fmt}, {elapsed}{postfix}"
            self._bar.set_postfix_str(news)
        elif self._due():
            logger.info(f"{self._name}: {self._done}/{self._total}, {news}")

    def _due(self, *, silence: bool = False) -> bool:
        """Whether it is time for the next line of the log; with ``silence``, it is not soon after a line of another bar."""
        global _said
        now, pause = time.monotonic(), 15 * (1 + silence)
        due = self._logs and now - max(self._logged, _said * silence) > max(pause, pause * (now - self._began) / 150)
        if due:
            _said = self._logged = now
        return due


@contextlib.contextmanager
def progress_bar(name: str, total: int, *, start: int = 0, show: bool = True, bar_format: str | None = None) -> Iterator[Bar]:
    """A bar that is live on a terminal, and lines of the log elsewhere. Of several processes, one has it.

    Args:
        bar_format: tqdm's, of the live bar.
    """
    show = show and current().main
    live = show and sys.stderr.isatty()
    with tqdm(total=total, initial=start, desc=name, ncols=100, leave=False, disable=not live, bar_format=bar_format) as bar:
        yield Bar(name, total, bar, logs=show)


@contextlib.contextmanager
def shown(name: str, measured: Measured, planned: int) -> Iterator[None]:
    """Show how much of its planned :attr:`Measured.work` the block has done; nothing if that is not known (0)."""
    if not planned:
        yield
        return
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with progress_bar(name, planned, bar_format=form) as bar, watched(lambda: bar.reach(measured.work)):
        yield
