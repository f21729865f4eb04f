"""The stages of a finished run: the folders that its record names, also where today's code would name others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recbole_llm.store.files import DamagedError, verify
from recbole_llm.store.stages import Stage, StageCache, in_order


@dataclass
class RecordedStages(StageCache):
    """Stages of a run by their names in its record; a stage that it does not name is computed as usual.

    Attributes:
        recorded: the name of each stage's folder.
        run_root: where the recorded stages are, which is only read; None: in ``root``, where others are computed.
        again: how to repeat the run, for errors.
        changed: roles of stages whose settings are no longer those of the run: only the very same stage is taken from it.
    """

    recorded: Mapping[str, str] = field(default_factory=dict)
    run_root: Path | None = None
    again: str = "repeat the run"
    changed: frozenset[str] = frozenset()

    def folder(self, stage: Stage) -> Path:
        own, run = super().folder(stage), self.run_root or self.root
        if own.name in self.recorded.values():
            return run / own.name
        if stage.second_name in self.recorded:
            return run / self.recorded[stage.second_name]
        if stage.name not in self.recorded or stage.role in self.changed:
            return own
        return run / self.recorded[stage.name]

    def run(self, *stages: Stage) -> Path:
        """Check the folders of recorded stages, and compute the others; returns the folder of the first stage.

        Raises:
            ValueError: a folder that the record names is missing or damaged.
        """
        needed: set[str] = set()  # fingerprints of the stages that the record does not name, and of their inputs
        for stage in reversed(in_order(stages)):
            if self._is_recorded(stage):
                self._check(stage)
            elif stage in stages or stage.fingerprint in needed:
                needed |= {stage.fingerprint, *(other.fingerprint for other in stage.inputs)}
        for stage in in_order(stages):
            if stage.fingerprint in needed and not self._is_recorded(stage):
                self._run(stage)
        return self.folder(stages[0])

    def _is_recorded(self, stage: Stage) -> bool:
        return self.folder(stage).name in self.recorded.values()

    def _check(self, stage: Stage) -> None:
        folder = self.folder(stage)
        try:
            verify(folder)
        except DamagedError as error:
            raise ValueError(f"the stage {stage.name} of this run is missing or damaged ({error}); {self.again}") from error
        self.folders.setdefault(stage.name, folder)
