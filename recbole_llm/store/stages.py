"""Stages: the cached steps of a run that train or merge. The folder of a result is named by a hash of everything it depends on.

A stage is computed once and reused by later runs with the same data, settings, code and upstream stages. A killed run resumes
from the last checkpoint of its current stage.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import torch
from recbole.utils import init_seed

from recbole_llm.store import curves
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.contexts import holding
from recbole_llm.store.costs import Cost, Measured, metered
from recbole_llm.store.files import DamagedError, atomic_folder, atomic_write, fingerprint, is_complete, verify
from recbole_llm.store.json_files import read_object
from recbole_llm.store.locks import locked
from recbole_llm.store.processes import current
from recbole_llm.store.progress import shown

logger = getLogger()

CURVE = "curve.jsonl"  # of an unfinished stage, which grows at each point
TRAINED_FILE = "trained.json"  # the number of parameters that a stage trained
_trained: ContextVar[list[int] | None] = ContextVar("trained", default=None)


def count_trained(parameters: Iterable[torch.Tensor]) -> None:
    """Add those of these parameters that are trained to the count of the current stage, if any."""
    counts = _trained.get()
    if counts is not None:
        counts.append(sum(parameter.numel() for parameter in parameters if parameter.requires_grad))


class Folders(Protocol):
    """The folders of results: a :class:`StageCache`, or the :class:`Work` of a later stage."""

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's result."""
        ...


@dataclass(frozen=True)
class Work:
    """The argument of a stage's ``build``.

    Attributes:
        out: folder for the result.
        scratch: folder for checkpoints; deleted when the stage is done.
        results: the results of the stages before it.
    """

    out: Path
    scratch: Path
    results: Folders

    def folder(self, stage: Stage) -> Path:
        """The result folder of an earlier stage."""
        return self.results.folder(stage)


@dataclass(frozen=True)
class Stage:
    """One cached result.

    Args:
        name: shown in the log and in the folder's name.
        depends: JSON-serialisable values that determine the result: settings, fingerprints of data.
        build: writes the result to ``work.out``.
        inputs: stages that must run before.
        code: modules whose code computes the result, besides the one that defines ``build``; their imports are included.
        with_imports: whether the imports of that one are included too; False for a module that also defines other things.
        cost: computes what the stage costs, without running it; None: not estimated.
        role: what the run has it for, such as the key that names the model, if it may have several of one name.
    """

    name: str
    depends: Mapping[str, Any]
    build: Callable[[Work], None] = field(compare=False)
    inputs: tuple[Stage, ...] = ()
    code: tuple[str, ...] = ()
    with_imports: bool = True
    cost: Callable[[], Cost] | None = field(default=None, compare=False)
    role: str = field(default="", compare=False)

    @property
    def second_name(self) -> str:
        """What a run calls it if another of its stages has the name."""
        return f"{self.name} ({self.role})" if self.role else self.folder_name

    @property
    def folder_name(self) -> str:
        """The name of the folder of its result."""
        return f"{self.name}-{self.fingerprint[:12]}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the result depends on, the code included."""
        upstream = [stage.fingerprint for stage in self.inputs]
        own = (self.build.__module__,)
        code = code_fingerprint(*(own if self.with_imports else ()), *self.code, alone=() if self.with_imports else own)
        return fingerprint({"name": self.name, "depends": self.depends, "code": code, "inputs": upstream})


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all their inputs, each once, inputs first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found |= {other.fingerprint: other for other in in_order(stage.inputs) if other.fingerprint not in found}
        found.setdefault(stage.fingerprint, stage)
    return list(found.values())


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """The folder of a result, which process 0 writes; what others compute likewise is dropped."""
    if current().main:
        with atomic_folder(folder) as out:
            yield out
    else:
        with tempfile.TemporaryDirectory() as dropped:
            yield Path(dropped)


@dataclass
class StageCache:
    """Computes and caches the results of stages under ``root`` (``<checkpoint_dir>/stages``).

    Attributes:
        seconds: duration of each stage by its name in ``folders``; 0 for a reused result.
        measured: what each stage that ran has cost, by name.
        folders: folder of each result by name, or by :attr:`Stage.second_name` if another stage has that name.
        waited: seconds spent waiting for other processes that computed a stage.
        planned: :attr:`Cost.work` of stages by name, of which a bar shows the share that is done.
        earlier: seconds of the stages that ran, of those in ``seconds``, that killed processes have spent on them.
    """

    root: Path
    seed: int = 2020
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    waited: float = 0.0
    planned: Mapping[str, int] = field(default_factory=dict)
    earlier: float = 0.0

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's result, which may not exist yet."""
        return self.root / stage.folder_name

    def is_cached(self, stage: Stage) -> bool:
        """Whether the stage's result is complete."""
        return is_complete(self.folder(stage))

    def run(self, *stages: Stage) -> Path:
        """Compute the stages and all their inputs unless they are cached; returns the folder of the first stage."""
        for stage in in_order(stages):
            self._run(stage)
        return self.folder(stages[0])

    def trained(self, stage: Stage) -> int | None:
        """Number of parameters trained by a stage and all its inputs; None if it was not recorded."""
        files = [self.folder(part) / TRAINED_FILE for part in in_order([stage])]
        if not all(file.is_file() for file in files):
            return None
        return sum(json.loads(file.read_text())["parameters"] for file in files)

    def _run(self, stage: Stage) -> None:
        folder, processes = self.folder(stage), current()
        name = stage.name if self.folders.get(stage.name, folder) == folder else stage.second_name
        with self._locked(stage) as waited:
            self.waited += waited
            if processes.agree(processes.main and self._verified(folder)):
                logger.info(f"stage {stage.name}: reused from {folder}")
                self.seconds.setdefault(name, 0.0)
            else:
                measured = self._build(stage, folder, name)
                self.measured[name] = measured
                processes.wait()  # for the result of process 0
        self.folders[name] = folder

    @contextlib.contextmanager
    def _locked(self, stage: Stage) -> Iterator[float]:
        """Hold the lock of a stage: if two runs need the same one, one waits. Of several processes, the first has it for all."""
        if not current().main:
            yield 0.0
            return
        folder = self.folder(stage)
        with locked(folder, f"stage {stage.name}") as waited:
            self._sweep(folder, "tmp")  # left by a killed process
            yield waited
            self._sweep(folder, "unfinished")

    def _sweep(self, folder: Path, suffix: str) -> None:
        for leftover in self.root.glob(f".{folder.name}.*{suffix}"):
            shutil.rmtree(leftover)

    def _verified(self, folder: Path) -> bool:
        if not is_complete(folder):
            return False
        try:
            verify(folder)
        except DamagedError as error:
            logger.warning(f"{error}; it is computed again")
            shutil.rmtree(folder)
            return False
        return True

    def _build(self, stage: Stage, folder: Path, name: str) -> Measured:
        """Compute a stage, whose curve is called ``name``; returns what it took."""
        logger.info(f"stage {stage.name}: started")
        init_seed(self.seed, True)  # the result must not depend on which earlier stages were cached
        scratch = folder.with_name(f".{folder.name}.unfinished")
        scratch.mkdir(parents=True, exist_ok=True)
        planned = 0 if any(scratch.iterdir()) else self.planned.get(name, 0)  # what a resumed stage has done is not known
        earlier = _earlier_seconds(scratch) if current().main else 0.0
        counts: list[int] = []
        with metered() as measured, shown(f"stage {stage.name}", measured, planned), torch.enable_grad(), _written(folder) as out:
            with holding(_trained, counts), curves.recording(name, scratch / CURVE) as curve:
                stage.build(Work(out, scratch, self))
            curve.write(out)
            (out / TRAINED_FILE).write_text(json.dumps({"parameters": sum(counts)}))
        self.seconds[name] = measured.seconds + earlier
        self.earlier += earlier
        before = f", after {earlier:.1f} s in runs that were killed" if earlier else ""
        logger.info(f"stage {stage.name}: done in {measured.seconds:.1f} s{before}, cached in {folder}")
        return measured


def _earlier_seconds(scratch: Path) -> float:
    """Seconds that killed processes spent on a stage, each up to its last checkpoint; notes when this process begins."""
    note, seconds = scratch / "began.json", 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or a damaged one
        before = read_object(note)
        files = (file for file in scratch.rglob("*") if file.is_file() and file.name not in (note.name, CURVE))
        last = max((file.stat().st_mtime for file in files), default=0.0)
        seconds = before["earlier"] + max(last - before["began"], 0.0)
    atomic_write(note, json.dumps({"began": time.time(), "earlier": seconds}))
    return seconds
