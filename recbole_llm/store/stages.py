"""Stages: what a run trains or merges, each result kept in a folder that is named after everything it depends on.

A stage is trained once and found again by every later run with the same data, settings and upstream stages; a killed
run repeats only the stage it died in, from that stage's last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from recbole.utils import init_seed

from recbole_llm.store.files import DamagedError, atomic_folder, fingerprint, is_complete, verify

logger = getLogger()

TRAINED_FILE = "trained.json"  # how many parameters a stage has trained
_trained: ContextVar[list[int] | None] = ContextVar("trained", default=None)


def count_trained(parameters: Iterable[torch.Tensor]) -> None:
    """Tell the stage that is being built, if one is, that it trains these."""
    counts = _trained.get()
    if counts is not None:
        counts.append(sum(parameter.numel() for parameter in parameters))


@dataclass(frozen=True)
class Stage:
    """One kept result.

    Args:
        name: shown in the log and the folder's name.
        depends: JSON-able values that determine the result: settings, fingerprints of data.
        build: ``build(out, scratch)`` writes the result into the folder ``out``; ``scratch`` is where it may keep the
            state of unfinished work, which is deleted once the stage is done.
        inputs: stages whose results must be there first.
        version: raised when the code changes what the stage computes.
    """

    name: str
    depends: Mapping[str, Any]
    build: Callable[[Path, Path], None] = field(compare=False)
    inputs: tuple[Stage, ...] = ()
    version: int = 1

    @property
    def fingerprint(self) -> str:
        upstream = [stage.fingerprint for stage in self.inputs]
        return fingerprint({"name": self.name, "version": self.version, "depends": self.depends, "inputs": upstream})

    def with_inputs(self) -> Iterator[Stage]:
        """The stage and all before it, each once."""
        found = {self.fingerprint: self}
        for stage in self.inputs:
            found |= {other.fingerprint: other for other in stage.with_inputs()}
        yield from found.values()


@dataclass
class StageCache:
    """Runs stages whose result is not kept yet, under ``root`` (``<checkpoint_dir>/stages``).

    Of the stages it was asked for, by name, it knows what they took (``seconds``) and where they are (``folders``); and how long
    it waited for other processes to build some of them (``waited``, seconds).
    """

    root: Path
    seed: int = 2020
    seconds: dict[str, float] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    waited: float = 0.0

    def folder(self, stage: Stage) -> Path:
        """Where the stage's result is, or will be."""
        return self.root / f"{stage.name}-{stage.fingerprint[:12]}"

    def run(self, stage: Stage) -> Path:
        """The folder of the stage's result, built first where it is not there yet or is damaged."""
        for upstream in stage.inputs:
            self.run(upstream)
        folder = self.folder(stage)
        self.root.mkdir(parents=True, exist_ok=True)
        # of two runs that need the same stage, one builds and one waits; a killed process holds no lock
        asked = time.monotonic()
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            self.waited += time.monotonic() - asked
            self._sweep(folder, "tmp")  # of a process killed while it wrote
            if self._kept(folder):
                logger.info(f"stage {stage.name}: kept in {folder}")
                self.seconds.setdefault(stage.name, 0.0)
            else:
                self._build(stage, folder)
            self._sweep(folder, "unfinished")
        self.folders.setdefault(stage.name, folder)  # a retriever, asked for last, may be named as the model's own part
        return folder

    def trained(self, stage: Stage) -> int | None:
        """How many parameters the kept results of a stage and of all before it have trained; None where that is not kept."""
        files = [self.folder(part) / TRAINED_FILE for part in stage.with_inputs()]
        if not all(file.is_file() for file in files):
            return None
        return sum(json.loads(file.read_text())["parameters"] for file in files)

    def _sweep(self, folder: Path, suffix: str) -> None:
        for leftover in self.root.glob(f".{folder.name}.*{suffix}"):
            shutil.rmtree(leftover)

    def _kept(self, folder: Path) -> bool:
        if not is_complete(folder):
            return False
        try:
            verify(folder)
        except DamagedError as error:
            logger.warning(f"{error}; rebuilt now")
            shutil.rmtree(folder)
            return False
        return True

    def _build(self, stage: Stage, folder: Path) -> None:
        logger.info(f"stage {stage.name}: started")
        began = time.monotonic()
        # a stage's result must not depend on which of the stages before it were kept
        init_seed(self.seed, True)
        scratch = folder.with_name(f".{folder.name}.unfinished")
        scratch.mkdir(parents=True, exist_ok=True)
        with torch.enable_grad(), atomic_folder(folder) as out:  # the first to ask may be an evaluation
            token = _trained.set([])
            try:
                stage.build(out, scratch)
                (out / TRAINED_FILE).write_text(json.dumps({"parameters": sum(_trained.get() or [])}))
            finally:
                _trained.reset(token)
        self.seconds[stage.name] = time.monotonic() - began
        logger.info(f"stage {stage.name}: done in {self.seconds[stage.name]:.1f} s, kept in {folder}")
