"""Progress bars on a terminal, and log lines elsewhere: every 15 s at first, then less often, so that a long log stays short."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from logging import getLogger

from torch import Tensor
from tqdm import tqdm

from recbole_llm.store.processes import current

logger = getLogger()


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

    def tell(self, news: str) -> None:
        """Show what is under way."""
        if not self._bar.disable:
            self._bar.bar_format = "{desc}: {n_fmt}/{total_fmt}, {elapsed}{postfix}"
            self._bar.set_postfix_str(news)
        elif self._due():
            logger.info(f"{self._name}: {self._done}/{self._total}, {news}")

    def _due(self) -> bool:
        """Whether it is time for the next line of the log."""
        now = time.monotonic()
        due = self._logs and now - self._logged > max(15, (now - self._began) / 10)
        if due:
            self._logged = now
        return due


@contextlib.contextmanager
def progress_bar(name: str, total: int, *, start: int = 0, show: bool = True) -> Iterator[Bar]:
    """A bar that is live on a terminal, and lines of the log elsewhere. Of several processes, one has it."""
    show = show and current().main
    live = show and sys.stderr.isatty()
    with tqdm(total=total, initial=start, desc=name, ncols=100, leave=False, disable=not live) as bar:
        yield Bar(name, total, bar, logs=show)
