"""Progress bars on a terminal, and log lines elsewhere."""

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


class _Bar:
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
        elif self._logs and time.monotonic() - self._logged > 15:
            self._logged = time.monotonic()
            left = (self._logged - self._began) / max(self._done - self._start, 1) * (self._total - self._done)
            shown = "" if loss is None else f", loss {float(loss):.3f}"
            logger.info(f"{self._name}: {self._done}/{self._total}{shown}, {left:.0f} s left")


@contextlib.contextmanager
def progress_bar(name: str, total: int, *, start: int = 0, show: bool = True) -> Iterator[_Bar]:
    """A bar with ``advance(amount, loss)``: live on a terminal, else a log line every 15 s. Of several processes, one has it."""
    show = show and current().main
    live = show and sys.stderr.isatty()
    with tqdm(total=total, initial=start, desc=name, ncols=100, leave=False, disable=not live) as bar:
        yield _Bar(name, total, bar, logs=show)
