"""The tasks of a leaderboard, each an ordinary run, from one property file::

    dataset: ml-100k
    seeds: [2020, 2021, 2022]
    protocols:                          # name -> its keys; each is one table
      candidates: {}
    settings: {epochs: 30}              # (dict) keys of every run
    models:
      Pop: {}
      SASRec: {config_files: properties/tuned/ml-100k/SASRec.yaml, settings: {epochs: 15}}
      zero-shot: {model: TALLRec, row: no adapter}    # another row of the record of TALLRec
      BERT4Rec: {seeds: [2020]}                       # fewer seeds than the other models

The value of the key ``note``, such as how the settings were found, is shown with the row. The untrained shortcuts are rows of
every leaderboard, with the first seed alone, unless the file has ``shortcuts: False``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.utils import ModelType

from recbole_llm.classical import record_inputs
from recbole_llm.classical.record_code import record_code
from recbole_llm.config import LLMConfig
from recbole_llm.config.definitions import Definition
from recbole_llm.config.property_files import PropertyFiles, property_file, read_yaml
from recbole_llm.config.values import parse_value
from recbole_llm.data.forms import several_targets
from recbole_llm.data.items import lacks_titles
from recbole_llm.evaluation import predictions
from recbole_llm.evaluation.record_files import DamagedRecordError, read_record
from recbole_llm.leaderboard.table import Cell
from recbole_llm.registry import SHORTCUTS

logger = getLogger()

# the form of the file and of an entry of `models`
_FILE = {
    "dataset": "(str)",
    "seeds": "(list of int in [0, 4294967295])",
    "protocols": "(dict of settings)",
    "settings": "(settings)",
    "models": "(dict of dict)",
    "shortcuts": "(bool)",
    "claims": "(dict of dict)",  # read by recbole_llm.replication
    "decide_on": "(settings)",
    "remark": "(str)",
}
_ENTRY = {
    "model": "(str)",
    "row": "(str)",
    "seeds": _FILE["seeds"],
    "config_files": "(str) or (list of str)",
    "settings": "(settings)",
    "protocols": "(list of str)",
}
_OF_THE_FILE = {
    "model": "models",
    "dataset": "dataset",
    "seed": "seeds",
}  # a key of a run -> that of the file, which names the runs
_COSTS = ("trained_parameters", "stage_seconds", "seconds", "users_per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class Task:
    """One run of one model; ``settings`` override ``config_files``.

    ``row`` names the row of the record that is shown, by default that of the model.
    """

    label: str
    model: str
    dataset: str
    seed: int
    protocol: str
    settings: Mapping[str, Any] = field(hash=False)
    row: str | None = None
    config_files: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``run_recbole_llm.py``."""
        files = {"config_files": " ".join(self.config_files)} if self.config_files else {}
        values = {"model": self.model, "dataset": self.dataset, **files, **self.settings, "seed": self.seed}
        return [f"--{key}={_literal(value)}" for key, value in values.items()]

    @property
    def is_done(self) -> bool:
        """Whether there is a sound record, with predictions if they are to be saved; raises as :attr:`config`."""
        needed = [self.record, *([self.record.with_name(predictions.FILE)] if self.config["save_predictions"] else [])]
        return all(file.is_file() for file in needed) and self.damage is None

    @property
    def damage(self) -> str | None:
        """What is wrong with the record; None if nothing is, or if there is none. Raises as :attr:`config`."""
        file, identity = self.record, self.config.fingerprint
        try:
            read_record(file, identity)
        except FileNotFoundError:
            pass
        except Exception as error:  # an edited record may have anything in it
            return error.fault if isinstance(error, DamagedRecordError) else str(error)
        return None

    @property
    def is_current(self) -> bool:
        """Whether it :attr:`is_done`, by the code and from the files as they are now; raises as :attr:`config`."""
        return self.is_done and self.outdated is None

    @property
    def outdated(self) -> str | None:
        """Why the record is not of now; None if it is, or if there is none. Raises as :attr:`read`."""
        record = self.read()
        if self.is_of_other_code(record):
            return f"{self.record} was written by other code"
        return f"{self.record} is of other data: {files} changed since" if (files := self.changed_files(record)) else None

    def changed_files(self, record: Mapping[str, Any] | None) -> str:
        """The files that a record was made of and that are others now; empty if none is."""
        return "" if record is None else ", ".join(record_inputs.changed(record, self.config))

    def is_of_other_code(self, record: Mapping[str, Any] | None) -> bool:
        """Whether a record was written by other code than would run now; one that names no code was."""
        return record is not None and record.get("code") != record_code(self.config)

    def with_settings(self, settings: Mapping[str, Any]) -> Task:
        """The task with additional settings, which override its own."""
        return replace(self, settings=PropertyFiles().merge(self.settings, settings))

    @cached_property
    def record(self) -> Path:
        """The file of the run record; raises as :attr:`config`."""
        return self.config.record_file

    @cached_property
    def config(self) -> LLMConfig:
        """The configuration of the run.

        Raises:
            ValueError, FileNotFoundError: as the run itself.
        """
        values = [f"--{key}={_literal(value)}" for key, value in {**self.settings, "seed": self.seed}.items()]
        name = f"the settings of `{self.label}`"
        return LLMConfig(self.model, self.dataset, self.config_files, cmd_line=values, cmd_name=name)

    def cell(self, error: str | None = None) -> Cell:
        """The cell of the leaderboard: the record of the run, or ``error``, the reason why there is none."""
        note = record = None
        other = False
        try:
            note = "; ".join(str(self.config[key]) for key in ("origin", "note") if self.config[key])
            record = None if error else self.read()
            other = self.is_of_other_code(record)
            files = "" if other else self.changed_files(record)
            note = "; ".join(filter(None, [note, files and f"{files} changed since"]))
        except DamagedRecordError as problem:
            error = error or f"{problem.fault}; without --show it is run again"
        except Exception as problem:  # no configuration, no record
            error, record = error or str(problem), None
        name = self.row or self.model.rpartition(":")[2]
        rows = record.get("results", {}) if record else {}
        if record and name not in rows:
            record, error = None, f"its run has no row `{name}`; known: {', '.join(rows)}"
        if record and (imported := record.get("imported")):
            missed = (record.get("missed_targets") or {}).get(name)
            note = "; ".join(filter(None, [note, imported.get("remark"), missed and f"{missed:,} targets not in the file"]))
        if record and (self.row or record.get("imported")):  # the costs are those of the model's own row, or unknown
            record = {key: value for key, value in record.items() if key not in _COSTS}
        command = shlex.join(["python", "run_recbole_llm.py", *self.arguments])
        commit = record.get("commit") if record else None
        return Cell(self.label, name, self.seed, self.protocol, command, record, error, commit, note or None, other)

    def read(self) -> dict[str, Any] | None:
        """The record; None before the run.

        Raises:
            DamagedRecordError: it is damaged, contradicts itself or is of another run.
            ValueError, FileNotFoundError: as :attr:`config`.
        """
        return read_record(self.record, self.config.fingerprint) if self.record.is_file() else None


def read_plan(file: Path, changes: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks of a property file, model by model, then protocol by protocol, then seed by seed.

    Args:
        changes: keys of every run that override the file's, such as ``data_path`` or ``checkpoint_dir``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing key; names it and the file.
    """
    plan = read_yaml(property_file(file))
    check_form(str(file), plan, _FILE, needed=("dataset", "seeds", "models"))
    _check_each_once(str(file), plan)
    protocols, merge = plan.get("protocols") or {"candidates": {}}, PropertyFiles().merge
    protocols = {str(name): own for name, own in protocols.items()}  # such as 100, a number of negatives
    _check_keys("command line", changes, file)
    for where, keys in {
        "settings": plan.get("settings"),
        **{f"protocols: `{name}`": own for name, own in protocols.items()},
    }.items():
        _check_keys(f"{file}: {where}", keys, file)
    tasks = []
    for label, given in plan["models"].items():
        check_form(f"{file}: `{label}`", given or {}, _ENTRY)
        _check_each_once(f"{file}: `{label}`", given or {})
        entry = {"model": str(label), **(given or {})}
        _check_keys(f"{file}: `{label}`: settings", entry.get("settings"), file)
        for protocol in entry.get("protocols") or protocols:
            if protocol not in protocols:
                raise ValueError(f"{file}: `{label}` has an unknown protocol {protocol!r}; known: {', '.join(protocols)}")
            parts = (plan.get("settings"), protocols[protocol], entry.get("settings"), changes)
            files = entry.get("config_files") or ()
            files = tuple(files.split() if isinstance(files, str) else files)
            own = merge(*(part or {} for part in parts)), entry.get("row"), files
            seeds = entry.get("seeds") or plan["seeds"]
            seeds = seeds[:1] if _is_one_file(entry["model"], own[0], files) else seeds
            tasks += [Task(str(label), entry["model"], plan["dataset"], seed, protocol, *own) for seed in seeds]
    listed = {task.label for task in tasks} | {task.model for task in tasks}
    for name in SHORTCUTS if plan.get("shortcuts") in (None, True) else ():
        for protocol, keys in protocols.items() if name not in listed else ():
            settings = merge(*(part or {} for part in (plan.get("settings"), keys, changes)))
            task = Task(name, name, plan["dataset"], plan["seeds"][0], protocol, settings)
            if reason := _unsuited(task, [other for other in tasks if other.protocol == protocol]):
                logger.info(f"leaderboard: no row {name} ({protocol}), which {reason}")
            else:
                tasks.append(task)
    return tasks


def _check_each_once(where: str, given: Mapping[str, Any]) -> None:
    """Refuse a list of seeds or protocols that is empty or has one twice, before anything is run."""
    for key in ("seeds", "protocols"):
        values = given.get(key)
        if isinstance(values, list) and (not values or len({*values}) < len(values)):
            raise ValueError(f"{where}: {key}: {values!r} {'has one twice' if values else 'is empty'}; list each of them once")


def _check_keys(where: str, keys: Mapping[str, Any] | None, file: Path) -> None:
    """Refuse keys that would name other runs than those whose records are read."""
    for key, own in _OF_THE_FILE.items():
        if key in (keys or {}):
            raise ValueError(
                f"{where}: {key}: {(keys or {})[key]!r} is no key of every run; change `{own}` in {file}, or in a copy"
            )


def _is_one_file(model: str, settings: Mapping[str, Any], files: Sequence[str]) -> bool:
    """Whether all seeds would read one file of predictions, whose interval over seeds would be 0."""
    if model != "Imported":
        return False
    try:
        given = {key: value for file in files for key, value in read_yaml(property_file(file)).items()}
    except (ValueError, FileNotFoundError):
        return True  # no seed can run, which the first one reports
    return "{seed}" not in str({**given, **settings}.get("predictions"))


def _unsuited(task: Task, others: Sequence[Task]) -> str | None:
    """Why a shortcut has no row beside ``others``; None if it can have one."""
    try:
        reason = lacks_titles(task.config) if task.config.model_class.uses_item_text else None
    except FileNotFoundError:
        return None  # which the run reports
    except ValueError as error:  # which the other rows have, too, if it is not the model's
        return f"cannot run: {error}"
    if reason:
        return f"needs titles: {reason}"
    if several_targets(task.config) and any(map(_ranks_together, others)):
        return "ranks the targets of a user one by one, and other rows rank them together"
    return None


def _ranks_together(task: Task) -> bool:
    """Whether RecBole ranks all targets of a user together, as for general models; False for an invalid configuration."""
    try:
        return task.config["MODEL_TYPE"] != ModelType.SEQUENTIAL
    except (ValueError, FileNotFoundError):
        return False


def check_form(where: str, values: Any, form: Mapping[str, str], needed: tuple[str, ...] = ()) -> None:
    """Check keys and types; None stands for a key that is not given, and for an empty entry of a dictionary.

    Args:
        where: names the file in messages.
        form: key -> type, as in the comments of ``properties/``.
        needed: keys that must be there and not be empty.

    Raises:
        ValueError: names ``where``, the key and the value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r} is not a dictionary; docs/leaderboard.md describes the form of the file")
    for key, value in values.items():
        if key not in form:
            raise ValueError(f"{where}: unknown key `{key}`; known: {', '.join(form)}")
        definition = Definition.read(form[key], Path(where))
        given = {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else value
        if definition and value is not None and not definition.accepts(given):
            raise ValueError(f"{where}: {key}: {value!r} is not {definition}; docs/leaderboard.md describes the form of the file")
    for key in needed:
        if not values.get(key):
            raise ValueError(f"{where}: `{key}` is missing or empty")


def _literal(value: Any) -> str:
    """The text of a command line that is read as ``value`` again."""
    return value if isinstance(value, str) and parse_value(value) == value else repr(value)
