"""Curves of training: the loss and the validation score of each stage, recorded while it is trained and stored with its result.

A point is recorded once. The points of an unfinished stage lie beside its checkpoints, so a resumed training, which computes the
steps since its last checkpoint again, adds what is missing. Of several processes, process 0 records.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any, Self

from recbole_llm.store.contexts import holding
from recbole_llm.store.files import atomic_write
from recbole_llm.store.json_files import read_object
from recbole_llm.store.processes import current

logger = getLogger()

FILE = "curve.json"
POINTS = 200  # of the loss of a training, at most
Report = Callable[[str, str, int, float, str], None]
"""Takes a point: the name of the stage, the metric, the step, the value, and what a step is."""


@dataclass
class Curve:
    """What was recorded of one training.

    Attributes:
        name: of the stage, or of the model that RecBole's trainer trains after the stages.
        unit: what a step is, ``step`` (of the optimiser) or ``epoch``.
        points: (step, value) by metric (``loss``, ``valid NDCG@10``), with rising steps.
    """

    name: str
    unit: str = "step"
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, metric: str, step: int, value: float) -> bool:
        """Add a point, unless it is not a finite number or the curve has one of this or a later step; returns whether it did."""
        own = self.points.setdefault(metric, [])
        if not math.isfinite(value) or (own and step <= own[-1][0]):
            return False
        own.append((step, value))
        return True

    def plain(self) -> dict[str, Any]:
        """The curve as JSON-able data."""
        return {"unit": self.unit, "points": self.points}

    def write(self, folder: Path) -> None:
        """Write the curve to the folder of a stage's result, if there is a point."""
        if any(self.points.values()):
            (folder / FILE).write_text(json.dumps(self.plain()))

    @classmethod
    def read(cls, folder: Path, name: str) -> Self | None:
        """The curve of a stage's folder; None if it has none, or none that can be read."""
        try:
            found = read_object(folder / FILE, 2**24)
            curve = cls(name, str(found["unit"]))
            for metric, points in found["points"].items():
                for step, value in points:
                    curve.add(metric, int(step), float(value))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(f"{folder / FILE}: not a curve that can be drawn ({error})")
            return None
        return curve


@dataclass
class _Recorder:
    curve: Curve
    journal: Path | None  # a line for each point

    def add(self, metric: str, step: int, value: float, unit: str) -> None:
        curve = self.curve
        curve.unit = unit
        if curve.add(metric, step, value):
            if self.journal is not None:
                with open(self.journal, "a", encoding="utf-8") as file:
                    file.write(json.dumps([metric, step, value, unit]) + "\n")
            _report(curve.name, metric, step, value, unit)

    def resume(self) -> None:
        """Add the points of the journal; a last line that is not whole is dropped."""
        if self.journal is None or not self.journal.is_file():
            return
        whole = []
        for line in self.journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                metric, step, value, unit = json.loads(line)
                self.curve.unit, new = str(unit), self.curve.add(str(metric), int(step), float(value))
            except (ValueError, TypeError):
                break
            if new:
                whole.append(line + "\n")
                _report(self.curve.name, str(metric), int(step), float(value), str(unit))
        atomic_write(self.journal, "".join(whole))


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
_run: ContextVar[tuple[Report | None, str]] = ContextVar("run", default=(None, "score"))


def _report(name: str, metric: str, step: int, value: float, unit: str) -> None:
    report, _ = _run.get()
    if report is not None:
        report(name, metric, step, value, unit)


def reporting(to: Report | None, valid_metric: str) -> contextlib.AbstractContextManager[None]:
    """Give every point that is recorded in the block to ``to`` as well, the earlier ones of a resumed training included.

    Args:
        valid_metric: the name of the validation scores of the run.
    """
    return holding(_run, (to, valid_metric))


@contextlib.contextmanager
def recording(name: str, journal: Path | None = None) -> Iterator[Curve]:
    """Record the training in the block; yields its curve.

    Args:
        journal: file of the points, from which a later call goes on; None: of a training that is not resumed.
    """
    recorder = _Recorder(Curve(name), journal)
    if not current().main:
        yield recorder.curve
        return
    recorder.resume()
    with holding(_recorder, recorder):
        yield recorder.curve


def record(metric: str, step: int, value: float, unit: str = "step") -> None:
    """Add a point to the curve of the current training, if it is recorded."""
    if (recorder := _recorder.get()) is not None:
        recorder.add(metric, step, value, unit)


def record_valid(step: int, score: float, unit: str = "step", metric: str | None = None) -> None:
    """Add a validation score; ``metric`` is its name, if that is not the run's ``valid_metric``."""
    record(f"valid {metric or _run.get()[1]}", step, score, unit)


def is_point(step: int, total: int) -> bool:
    """Whether the loss is recorded after this step of ``total``, so that a curve has at most :data:`POINTS` + 1 points."""
    return step % -(-total // POINTS) == 0 or step == total
