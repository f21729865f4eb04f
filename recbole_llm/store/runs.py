"""Finished runs: where the record of one is, and its stages, from which another run can be initialised (``init_from``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.store.files import DamagedError, is_within, verify
from recbole_llm.store.json_files import CHECKSUM, checksum, read_object
from recbole_llm.store.shared_runs import is_shared, shared_record

RUNS = "runs"
"""The folder of runs in ``checkpoint_dir``."""


def record_file(given: str | Path, key: str) -> Path:
    """The record of a run: ``<checkpoint_dir>/runs/<run>/record.json``, or that of a shared run, checked against its manifest.

    Args:
        given: the run's folder, its record.json, the folder of a shared run, or ``hub:user/name``.
        key: for errors, such as ``--run``.

    Raises:
        ValueError: there is no such run, or a shared one is damaged or cannot be read.
    """
    if (shared := shared_record(str(given), key)) is not None:
        return shared
    path = Path(os.path.abspath(Path(given).expanduser()))  # links stay: the hub's cache has one for each file
    path = path / "record.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{key}: there is no run at {given} ({path} does not exist); give a run's folder, as "
            "saved/runs/Laser-ml-100k-1234abcd, its record.json, a shared folder, or hub:user/name"
        )
    if is_shared(root_of(path)):
        shared_record(str(root_of(path)), key)
    return path


def again(record: Mapping[str, Any], path: Path, *, beside: bool = True) -> str:
    """How to get what is missing or damaged of a run, for errors.

    Args:
        record: its content, as far as that can be read.
        path: of the record.
        beside: it belongs into the ``checkpoint_dir``, beside the folder of runs, and not into the record.
    """
    if is_shared(root_of(path)):
        return "get it again, or ask who shared it for one of this version"
    if beside and path.parent.parent.name != RUNS:
        return (
            f"the weights lie beside the folder {RUNS}, from which this run was moved; move it back to CHECKPOINT_DIR/{RUNS}, or "
            "share it from there (recbole-llm share)"
        )
    names = [f"--{key}={record[key]}" for key in ("model", "dataset") if isinstance(record.get(key), str)]
    return f"repeat the run ({' '.join(names) or 'the same model and dataset'} and its other options)"


def root_of(path: Path) -> Path:
    """The ``checkpoint_dir`` of a record, or the folder of a shared run."""
    return path.parent.parent.parent


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
        """The run of a folder or record.json, or a shared run.

        Raises:
            ValueError: as :func:`record_file`, or it is no record, a damaged one, or it does not name its stages.
        """
        path = record_file(given, "init_from")
        remedy = "give a run's folder, as saved/runs/Laser-ml-100k-1234abcd, or its record.json"
        try:
            record = read_object(path)
        except (OSError, DamagedError) as error:
            raise ValueError(
                f"init_from: {path} is no record of a run ({error}); {remedy}, or {again({}, path, beside=False)}"
            ) from error
        if not {"model", "dataset", "config"} <= record.keys():
            raise ValueError(f"init_from: {path} is no record of a run; {remedy}")
        run, anew = cls(path, record), again(record, path, beside=False)
        if CHECKSUM in record and record[CHECKSUM] != checksum(record):  # a shared one has its manifest's instead
            raise ValueError(f"init_from: {path} is damaged or was edited: its values are not those that the run wrote; {anew}")
        stages = record.get("stages")
        if not isinstance(stages, dict) or not all(is_within(run.root / "stages", name) for name in stages.values()):
            raise ValueError(f"init_from: {path} is damaged: its stages are not names of folders; {anew}")
        return run

    @property
    def root(self) -> Path:
        """The ``checkpoint_dir`` that contains the run."""
        return root_of(self.path)

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
        return again(self.record, self.path)
