"""The rows of a model that merges adapters: its own mixture, those of ``merge_beside`` and of ``placebos``, and their report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_llm.model.adapters import AdapterSpec, AdapterTraining
from recbole_llm.model.given_adapters import GivenAdapters
from recbole_llm.model.merges.placebos import Placebos
from recbole_llm.model.merges.report import MergeReport
from recbole_llm.model.merges.stages import AdapterMerging
from recbole_llm.model.merges.title_overlap import with_title_overlap
from recbole_llm.store.stages import Folders, Stage

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.evaluation.recommender import Facts


class MergeRows:
    """Plans the merges of a model's adapters.

    Args:
        name: of the stage of the model's own mixture, with which the names of the others begin.
        merging, training, given: those of the model.

    Attributes:
        stages: the stage of each merge by the name of its row, once they are planned; the model's own, ``merged``, is the first.
        report: the stage of ``merge_report``; None if the key is off.
    """

    def __init__(self, name: str, config: Any, merging: AdapterMerging, training: AdapterTraining, given: GivenAdapters):
        self._name, self._merging, self._reports = name, merging, config["merge_report"]
        self._placebos = Placebos(config["placebos"], training, given, merging)
        self._specs: Mapping[str, AdapterSpec] = {}
        self.stages: dict[str, Stage] = {}
        self.report: Stage | None = None

    def plan(
        self,
        sources: Mapping[str, Stage],
        specs: Mapping[str, AdapterSpec],
        candidates: Mapping[str, CandidateSet],
        *,
        target: str,
    ) -> None:
        """Plan the stages of all merges of ``sources``; arguments and errors as of :meth:`Placebos.stages`."""
        self._specs = specs
        self.stages = self._merging.stages(self._name, sources, candidates)
        self.report = MergeReport(self._merging).stage(self._name, sources, candidates) if self._reports else None
        self.stages |= self._placebos.stages(self._name, sources, specs, candidates, target=target)

    def folders(self, results: Folders) -> dict[str, Path]:
        """The folder of each merged adapter by the name of its row."""
        return {row: results.folder(stage) / "merged" for row, stage in self.stages.items()}

    def facts(self, facts: Facts) -> Facts:
        """Facts of the model, with the overlap of titles of the adapters that it merges."""
        return with_title_overlap(facts, self._specs)
