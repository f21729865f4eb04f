"""Cached scores of an evaluation.

The folder's name depends on everything that determines the scores. They are stored as fp32, so metrics from them are bit-equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from recbole_llm.store.files import DamagedError, is_complete, load_state, save_state
from recbole_llm.store.locks import locked, only_one
from recbole_llm.store.processes import current

logger = getLogger()


class CachedScores:
    """Scores [N, C] by user, read from ``folder`` if it exists, otherwise collected in :meth:`computed` and written to it.

    Attributes:
        found: whether cached scores were used.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._collected: list[tuple[Tensor, Tensor]] = []
        self._rows: dict[int, Tensor] = {}
        self.found = False
        self._read()

    def _read(self) -> None:
        if is_complete(self._folder):
            try:
                tensors, _ = load_state(self._folder)
                self._rows = dict(zip(tensors["users"].tolist(), tensors["scores"], strict=True))
            except (DamagedError, OSError) as error:  # or another process is putting its own in their place
                logger.warning(f"{error}; computing the scores again")
        if not all(current().gather(bool(self._rows))):  # all processes compute them, or none
            self._rows = {}

    @property
    def is_free(self) -> bool:
        """Whether the scores are there, or no other run computes them now."""
        if self._rows:
            return True
        with only_one(self._folder) if current().main else contextlib.nullcontext(True) as free:
            return current().agree(free)

    @contextlib.contextmanager
    def computed(self) -> Iterator[float]:
        """Write the scores that the block collects; yields the seconds of waiting for another run that computes the same ones."""
        if self._rows:
            yield 0.0
            return
        with locked(self._folder, "evaluation") if current().main else contextlib.nullcontext(0.0) as waited:
            self._read()  # those of the other run
            yield waited
            if self._collected and current().main:
                users, scores = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
                save_state(self._folder, {"users": users, "scores": scores}, {})

    def find(self, users: Tensor) -> Tensor | None:
        """Scores [B, C] of users [B], or None if they are not cached."""
        rows = [self._rows[user] for user in users.tolist() if user in self._rows]
        if len(rows) < len(users):
            return None
        self.found = True
        return torch.stack(rows)

    def add(self, users: Tensor, scores: Tensor) -> None:
        """Collect scores [B, C] of users [B]."""
        self._collected.append((users.cpu(), scores.detach().float().cpu()))
