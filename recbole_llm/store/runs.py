"""Finished runs on disk, from which another run can be initialised (``init_from``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.store.files import DamagedError, is_within, verify
from recbole_llm.store.json_files import read_object


@dataclass(frozen=True)
class SavedRun:
    """A finished run (``init_from``): its record and its stages.

    Attributes:
        path: its record.json.
        record: the content of that file.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, given: str | Path) -> SavedRun:
        """The run of a folder or record.json.

        Raises:
            ValueError: there is no such file, it is no record, or it does not name its stages.
        """
        path = Path(given).expanduser().resolve()
        path = path / "record.json" if path.is_dir() else path
        remedy = "give a run's folder, as saved/runs/Laser-ml-100k-1234abcd, or its record.json"
        try:
            record = read_object(path)
        except OSError as error:
            raise ValueError(f"init_from: there is no run at {given} ({path} cannot be read); {remedy}") from error
        except DamagedError as error:
            raise ValueError(f"init_from: {path} is no record of a run ({error}); {remedy}") from error
        if not {"model", "dataset", "config"} <= record.keys():
            raise ValueError(f"init_from: {path} is no record of a run; {remedy}")
        run = cls(path, record)
        if "stages" not in record:
            raise ValueError(f"init_from: {path} is older than records that name their stages; {run._again}")
        stages = record["stages"]
        if not isinstance(stages, dict) or not all(is_within(run.root / "stages", name) for name in stages.values()):
            raise ValueError(f"init_from: {path} is damaged: its stages are not names of folders; {run._again}")
        return run

    @property
    def root(self) -> Path:
        """The ``checkpoint_dir`` that contains the run."""
        return self.path.parent.parent.parent

    def stage(self, name: str) -> Path:
        """The verified folder of a stage of the run.

        Raises:
            ValueError: the run has no such stage, or its folder is missing or damaged.
        """
        stages = self.record["stages"]
        if name not in stages:
            known = ", ".join(stages) or "none"
            raise ValueError(f"init_from: {self.path} has no stage {name} (it has: {known}); give the run that trained it")
        folder = self.root / "stages" / stages[name]
        try:
            verify(folder)
        except DamagedError as error:
            raise ValueError(
                f"init_from: the stage {name} of {self.path} is missing or damaged ({error}); {self._again}"
            ) from error
        return folder

    @property
    def _again(self) -> str:
        return f"repeat the run (--model={self.record['model']} --dataset={self.record['dataset']} and its other options)"
