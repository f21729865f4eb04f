"""What a part of a run costs, planned or measured: samples, steps, an LM's tokens, parameters, memory, floating-point operations.

A part plans its cost as a :class:`Cost`. While it runs, :func:`count` adds every forward pass of the LM to the current
:func:`metered` block, so that a plan can be compared with what happened.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace

from recbole_llm import compat
from recbole_llm.store.contexts import holding


@dataclass(frozen=True)
class Tokens:
    """Tokens in forward passes of an LM.

    Attributes:
        passes: number of forward passes.
        real, fed: tokens without and with padding.
        pairs: pairs of a query and a key in attention, padding included.
        logits: positions at which logits are computed.
        most_fed, most_cached, most_logits: the largest of one pass; cached are the tokens whose keys and values are in memory.
    """

    passes: int = 0
    real: int = 0
    fed: int = 0
    pairs: int = 0
    logits: int = 0
    most_fed: int = 0
    most_cached: int = 0
    most_logits: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        values = {}
        for entry in fields(self):
            pair = getattr(self, entry.name), getattr(other, entry.name)
            values[entry.name] = max(pair) if entry.name.startswith("most") else sum(pair)
        return Tokens(**values)

    def times(self, factor: float) -> Tokens:
        """The tokens of ``factor`` times as many passes."""
        counts = [entry.name for entry in fields(self) if not entry.name.startswith("most")]
        return replace(self, **{name: round(getattr(self, name) * factor) for name in counts})


@dataclass(frozen=True)
class Cost:
    """The planned cost of a stage or of the evaluation.

    Attributes:
        samples: training samples of an epoch, or users; None if unknown.
        steps: optimiser steps of all epochs; with early stopping, at most.
        trained, read: tokens of the LM with and without gradients, all epochs, validations included.
        parameters: number of parameters trained.
        memory: peak bytes by part; parts that are not in memory together are not in one plan.
        train_flops, read_flops: floating-point operations on ``trained`` and ``read``; None: not estimated.
        seconds: on this machine, of what is not in these operations, by a trial; None: not estimated.
        exact: False if the tokens were extrapolated from a sample.
        at_most: the figures are an upper bound.
        note: what is not in the figures.
    """

    samples: int | None = None
    steps: int | None = None
    trained: Tokens = Tokens()
    read: Tokens = Tokens()
    parameters: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    train_flops: float | None = None
    read_flops: float | None = None
    seconds: float | None = None
    exact: bool = True
    at_most: bool = False
    note: str = ""

    @property
    def tokens(self) -> Tokens:
        """Tokens with and without gradients."""
        return self.trained + self.read

    @property
    def flops(self) -> float | None:
        """All floating-point operations; None: not estimated."""
        if self.train_flops is None and self.read_flops is None:
            return None
        return (self.train_flops or 0) + (self.read_flops or 0)

    @property
    def peak(self) -> int:
        """The sum of ``memory``, bytes."""
        return sum(self.memory.values())

    @property
    def work(self) -> int:
        """As :attr:`Measured.work`."""
        return _work(self.trained, self.read)


@dataclass
class Measured:
    """What happened in a :func:`metered` block.

    Attributes:
        seconds: duration, once the block has ended.
        peak: largest memory of the process, or of the accelerator if there is one, up to the end of the block, in bytes.
    """

    trained: Tokens = Tokens()
    read: Tokens = Tokens()
    seconds: float = 0.0
    peak: int = 0

    @property
    def work(self) -> int:
        """Tokens so far, padding included; one with gradients counts three times, as its backward pass costs two forward ones."""
        return _work(self.trained, self.read)


_meters: ContextVar[tuple[Measured, ...]] = ContextVar("meters", default=())
_watchers: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("watchers", default=())


def _work(trained: Tokens, read: Tokens) -> int:
    return 3 * trained.fed + read.fed


@contextlib.contextmanager
def metered() -> Iterator[Measured]:
    """Measure the block; blocks may be nested, and each counts all passes in it."""
    measured, began = Measured(), time.monotonic()
    try:
        with holding(_meters, (*_meters.get(), measured)):
            yield measured
    finally:
        measured.seconds = time.monotonic() - began
        measured.peak = peak_memory_bytes()


def watched(watcher: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call ``watcher`` after every pass that is counted in the block."""
    return holding(_watchers, (*_watchers.get(), watcher))


def unmetered() -> contextlib.AbstractContextManager[None]:
    """Count no passes of the block: those of a check, which a plan does not contain."""
    return holding(_meters, ())


def count(tokens: Tokens, *, trained: bool) -> None:
    """Add the tokens of one forward pass to the current blocks."""
    for measured in _meters.get():
        if trained:
            measured.trained += tokens
        else:
            measured.read += tokens
    for watcher in _watchers.get():
        watcher()


def peak_memory_bytes() -> int:
    """The peak memory that PyTorch allocated on an accelerator, or the peak resident memory of this process on a CPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return compat.peak_memory_bytes()
