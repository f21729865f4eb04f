"""Cached answers of a language model, by user.

The folder's name depends on everything that determines the answers. It is written after each batch, so a killed run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

import torch

from recbole_llm.store.files import DamagedError, is_complete, load_state, save_state
from recbole_llm.store.processes import current

logger = getLogger()


class CachedAnswers:
    """Answers by internal user id, read from ``folder`` if it exists.

    Attributes:
        seconds: spent on generating them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds = 0.0
        self._answers: dict[int, str] = {}
        if is_complete(folder):
            try:
                tensors, values = load_state(folder)
                self._answers = dict(zip(tensors["users"].tolist(), values["answers"], strict=True))
                self.seconds = values["seconds"]
            except (DamagedError, OSError) as error:  # or another process is putting its own in their place
                logger.warning(f"{error}; generating the answers again")

    def __contains__(self, user: int) -> bool:
        return user in self._answers

    def __getitem__(self, user: int) -> str:
        return self._answers[user]

    def add(self, users: Sequence[int], answers: Sequence[str], seconds: float) -> None:
        """Add the answers of a batch of users and write all answers atomically."""
        self._answers.update(zip(users, answers, strict=True))
        self.seconds += seconds
        values = {"answers": list(self._answers.values()), "seconds": self.seconds}
        if current().main:
            save_state(self.folder, {"users": torch.tensor(list(self._answers))}, values)
