"""Scores of an evaluation, kept: an adapter and a candidate file that were scored once are not scored again.

They are named after all that determines them, as stages are, and kept as fp32, so metrics from kept scores are bit-equal.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from recbole_llm.store.files import DamagedError, is_complete, load_state, save_state

logger = getLogger()


class CachedScores:
    """Scores [N, C] by user, read from ``folder`` if they are there, collected for it otherwise.

    Attributes:
        found: some were.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._collected: list[tuple[Tensor, Tensor]] = []
        self._rows: dict[int, Tensor] = {}
        self.found = False
        if is_complete(folder):
            try:
                tensors, _ = load_state(folder)
                self._rows = dict(zip(tensors["users"].tolist(), tensors["scores"], strict=True))
            except DamagedError as error:
                logger.warning(f"{error}; scored again")

    def find(self, users: Tensor) -> Tensor | None:
        """Scores [B, C] of users [B], or None where they are not kept."""
        rows = [self._rows.get(user) for user in users.tolist()]
        if any(row is None for row in rows):
            return None
        self.found = True
        return torch.stack(rows)  # type: ignore[arg-type]

    def add(self, users: Tensor, scores: Tensor) -> None:
        """Collect scores [B, C] of users [B]."""
        self._collected.append((users.cpu(), scores.detach().float().cpu()))

    def close(self) -> None:
        """Write what was collected, whole or not at all."""
        if self._collected:
            users, scores = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
            save_state(self._folder, {"users": users, "scores": scores}, {})
