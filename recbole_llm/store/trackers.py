"""``report_to``: the curves of a run, live, in TensorBoard, Weights & Biases or MLflow, as in ``transformers``.

Each run is one run in the tracker, whose metrics have the names of the stages before them: ``ingredient/loss``. What has been
reported is noted in the folder of the run record until the run is complete. So a run that was killed and is started again
continues its run there, and reports no point twice. Reporting changes no result: a tracker that fails is left out with a warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

from recbole_llm.store.files import atomic_write
from recbole_llm.store.random_state import preserved_random_state

logger = getLogger()

STATE = "reported.jsonl"


class Tracker(Protocol):
    """A run in the store of a tracker."""

    identity: str | None
    """With which a later process can continue it; None if its place does."""

    def log(self, stage: str, metric: str, step: int, value: float, unit: str) -> None:
        """Add a point to the metric ``stage/metric``; ``unit`` is what a step is."""
        ...

    def close(self, *, failed: bool) -> None:
        """End the run there."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        folder: of the run record; its name is that of the run.
        settings: of the run, JSON-able.
        project: in Weights & Biases.
    """

    folder: Path
    settings: Mapping[str, Any]
    project: str


class _TensorBoard:
    """Event files in the folder ``tensorboard`` of the run, or in a folder with the run's name in TENSORBOARD_LOGGING_DIR.

    A run that is made again has a folder beside the earlier one, ``tensorboard-2``, since it reports no reused stages.
    """

    def __init__(self, run: TrackedRun, previous: str | None, *, resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(chosen).expanduser() / run.folder.name if chosen else run.folder / "tensorboard"
        taken = (folder.with_name(f"{folder.name}-{number}" if number > 1 else folder.name) for number in count(1))
        folder = (
            folder.with_name(previous) if previous else next(one for one in taken if not [*one.glob("events.out.tfevents.*")])
        )
        self.identity: str | None = folder.name
        self._writer = SummaryWriter(str(folder))
        if not resumed:
            self._writer.add_text("settings", f"```\n{json.dumps(run.settings, indent=1)}\n```")

    def log(self, stage: str, metric: str, step: int, value: float, unit: str) -> None:
        self._writer.add_scalar(f"{stage}/{metric}", value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, or the one that the calling program has open."""

    def __init__(self, run: TrackedRun, previous: str | None, *, resumed: bool):
        import wandb

        self._own, self._steps = wandb.run is None, set[str]()
        project = os.environ.get("WANDB_PROJECT", run.project)
        if self._own:
            folder = os.environ.get("WANDB_DIR", str(run.folder))
            again = {"id": previous, "resume": "allow"} if previous else {}
            self._run = wandb.init(project=project, name=run.folder.name, dir=folder, **again)
        else:
            self._run = wandb.run
        self._run.config.update(dict(run.settings), allow_val_change=True)
        self.identity = self._run.id if self._own else None

    def log(self, stage: str, metric: str, step: int, value: float, unit: str) -> None:
        axis = f"{stage}/{unit}"
        if axis not in self._steps:
            self._run.define_metric(axis)
            self._run.define_metric(f"{stage}/*", step_metric=axis)
            self._steps.add(axis)
        self._run.log({f"{stage}/{metric}": value, axis: step})

    def close(self, *, failed: bool) -> None:
        if self._own:
            self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of MLflow, or the one that the calling program has open; MLFLOW_TRACKING_URI and the like are read by mlflow."""

    def __init__(self, run: TrackedRun, previous: str | None, *, resumed: bool):
        import mlflow

        self._mlflow, self._own = mlflow, mlflow.active_run() is None
        if self._own:
            named = {"run_id": previous} if previous else {"run_name": run.folder.name}
            mlflow.start_run(**named)
        longest, most = mlflow.utils.validation.MAX_PARAM_VAL_LENGTH, mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH
        shown = [(key, value) for key, value in run.settings.items() if len(str(value)) <= longest]
        for start in range(0, len(shown), most) if self._own and not resumed else ():  # a run of the caller may have others
            mlflow.log_params(dict(shown[start : start + most]))
        self.identity = mlflow.active_run().info.run_id if self._own else None

    def log(self, stage: str, metric: str, step: int, value: float, unit: str) -> None:
        name = re.sub(r"[^0-9A-Za-z_\-\.\ :/]", "_", f"{stage}/{metric}")  # as transformers does
        self._mlflow.log_metric(name, value, step=step)

    def close(self, *, failed: bool) -> None:
        if self._own:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: Mapping[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _MLflow),
}
"""The values of ``report_to``: the module that each one needs, and what reports to it."""


def chosen(report_to: str | Sequence[str] | None, *, log_wandb: bool = False) -> tuple[str, ...]:
    """The trackers of ``report_to``: ``all`` are those whose packages are installed; RecBole's ``log_wandb`` adds ``wandb``.

    Raises:
        ValueError: ``none`` or ``all`` beside others, an unknown name, or a package that is not installed; names the key.
    """
    names = [report_to] if isinstance(report_to, str) else [*(report_to or ())]
    if len(names) > 1 and (word := next((word for word in ("none", "all") if word in names), None)):
        raise ValueError(f"report_to: {names} has {word} beside other names; give {word} alone, or leave it out")
    if names == ["all"]:
        names = [name for name, (module, _) in TRACKERS.items() if _is_installed(module)]
    names = list(dict.fromkeys([name for name in names if name != "none"] + (["wandb"] if log_wandb else [])))
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to: {name!r} is unknown; choose {', '.join(TRACKERS)}, all or none")
        if not _is_installed(TRACKERS[name][0]):
            key = "log_wandb" if log_wandb and name == "wandb" else "report_to"
            raise ValueError(
                f"{key}: {name} needs the package {name}, which is not installed; run: pip install {name} (or give "
                "--report_to=tensorboard, which is always installed)"
            )
    return tuple(names)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass
class Reports:
    """Gives points to trackers, each point once for a run, also if several processes after each other make the run.

    Attributes:
        trackers: by name.
        last: the last step that was reported, by stage and metric.
    """

    state: Path
    trackers: dict[str, Tracker] = field(default_factory=dict)
    last: dict[tuple[str, str], int] = field(default_factory=dict)

    def __call__(self, stage: str, metric: str, step: int, value: float, unit: str) -> None:
        """Report a point."""
        if not self.trackers or step <= self.last.get((stage, metric), -1):
            return
        self.last[stage, metric] = step
        for name, tracker in [*self.trackers.items()]:
            try:
                with preserved_random_state():
                    tracker.log(stage, metric, step, value, unit)
            except Exception as error:  # whatever it is, the run does not depend on it
                logger.warning(f"report_to: {name} failed ({type(error).__name__}: {error}); nothing more is reported to it")
                del self.trackers[name]
        self._note({"stage": stage, "metric": metric, "step": step})

    def start(self, names: Sequence[str], run: TrackedRun) -> None:
        """Start the run of each tracker, or continue the one of a process that was killed.

        Raises:
            ValueError: a tracker cannot start; names it and gives its reason.
        """
        before = self._read()
        for name in names:
            try:
                with preserved_random_state():
                    previous, resumed = before.get(name), name in before
                    self.trackers[name] = TRACKERS[name][1](run, previous, resumed=resumed)
            except Exception as error:
                self.close(failed=True)
                raise ValueError(f"report_to: {name} cannot start: {error}") from error
            self._note({"tracker": name, "identity": self.trackers[name].identity})

    def close(self, *, failed: bool) -> None:
        """End the runs of the trackers; a complete run leaves no note of what it reported."""
        for name, tracker in self.trackers.items():
            try:
                with preserved_random_state():
                    tracker.close(failed=failed)
            except Exception as error:
                logger.warning(f"report_to: {name} could not end its run ({type(error).__name__}: {error})")
        if not failed:
            self.state.unlink(missing_ok=True)

    def _note(self, line: Mapping[str, Any]) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        with open(self.state, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> dict[str, str | None]:
        """What an earlier process noted: the identity of each tracker's run; sets :attr:`last`."""
        if not self.state.is_file():
            return {}
        found, whole = dict[str, str | None](), []
        for text in self.state.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                if "tracker" in line:
                    found[str(line["tracker"])] = line["identity"]
                else:
                    self.last[str(line["stage"]), str(line["metric"])] = int(line["step"])
            except (ValueError, KeyError, TypeError):
                break  # the process was killed while it wrote
            whole.append(text + "\n")
        atomic_write(self.state, "".join(whole))
        return found


@contextlib.contextmanager
def reports(names: Sequence[str], run: TrackedRun) -> Iterator[Reports]:
    """Report the points of the block to the trackers ``names``."""
    found = Reports(run.folder / STATE)
    if not names:
        yield found
        return
    found.start(names, run)
    failed = True
    try:
        yield found
        failed = False
    finally:
        found.close(failed=failed)
