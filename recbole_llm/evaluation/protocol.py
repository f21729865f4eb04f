"""Candidate sets on the loaders of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_llm.classical.retriever import Retriever
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.store.stages import StageCache


class _TrainedWhenAsked(Retriever):
    """Not at all where the candidates are on disk."""

    def __init__(self, config: Any):
        super().__init__(config)
        self._cache = StageCache(Path(config["checkpoint_dir"]) / "stages", seed=config["seed"])

    def top(self, phase: str, number: int) -> dict[int, list[int]]:
        self.load(self._cache.run(self.stage))
        return super().top(phase, number)


def attach_candidates(config: Any, dataset: Any, train_data: Any, valid_data: Any, test_data: Any) -> None:
    """Give both evaluation loaders their ``candidates``, None in RecBole's own modes, and the training dataset all of them.

    Raises:
        ValueError, FileNotFoundError: as :func:`~recbole_llm.data.candidate_sets.candidate_sets`.
    """
    needed = config["candidate_phases"] and config["candidates"]["source"] == "retriever"
    found = candidate_sets(config, dataset, _TrainedWhenAsked(config) if needed else None)
    for candidates in found.values():
        _ = candidates.items  # now: a stage that runs later would change the seed under the model's construction
    valid_data.candidates, test_data.candidates = found.get("valid"), found.get("test")
    train_data._dataset.candidates = found
