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

An entry with ``row`` has the ``seeds`` and ``protocols`` of the entry whose runs it shows, unless it has its own.

The value of the key ``note``, such as how the settings were found, is shown with the row. The untrained shortcuts are rows of
every leaderboard, with the first seed alone, unless the file has ``shortcuts: False``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.utils import ModelType

from recbole_llm.config.definitions import Definition
from recbole_llm.config.key_groups import BOOKKEEPING
from recbole_llm.config.property_files import PropertyFiles, property_file, read_yaml
from recbole_llm.data.forms import several_targets
from recbole_llm.data.items import lacks_titles
from recbole_llm.leaderboard.task import Task
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


def read_plan(file: Path, changes: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks of a property file, model by model, then protocol by protocol, then seed by seed.

    Args:
        changes: keys of every run that override the file's, such as ``data_path`` or ``checkpoint_dir``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing key; names it and the file.
    """
    content = read_yaml(property_file(file))
    check_form(str(file), content, _FILE, needed=("dataset", "seeds", "models"))
    _check_each_once(str(file), content)
    protocols = content.get("protocols") or {"candidates": {}}
    protocols = {str(name): own or {} for name, own in protocols.items()}  # such as 100, a number of negatives
    models, settings = content["models"], content.get("settings") or {}
    plan = _Plan(file, content["dataset"], content["seeds"], protocols, models, settings, changes or {})
    plan.check()
    tasks = [task for label, entry in models.items() for task in plan.of_model(str(label), entry or {})]
    return tasks if content.get("shortcuts") is False else [*tasks, *plan.shortcuts(tasks)]


@dataclass(frozen=True)
class _Plan:
    """What the tasks of a property file share; ``protocols`` holds the keys of each, ``models`` the entries."""

    file: Path
    dataset: str
    seeds: Sequence[int]
    protocols: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any] | None]
    settings: Mapping[str, Any]
    changes: Mapping[str, Any]

    def check(self) -> None:
        _check_keys("command line", self.changes, self.file)
        _check_keys(f"{self.file}: settings", self.settings, self.file)
        for name, own in self.protocols.items():
            _check_keys(f"{self.file}: protocols: `{name}`", own, self.file)
        for label, given in self.models.items():
            check_form(f"{self.file}: `{label}`", given or {}, _ENTRY)

    def of_model(self, label: str, given: Mapping[str, Any]) -> list[Task]:
        """The tasks of an entry of ``models``."""
        where = f"{self.file}: `{label}`"
        _check_each_once(where, given)
        _check_keys(f"{where}: settings", given.get("settings"), self.file)
        if unknown := [name for name in given.get("protocols") or () if name not in self.protocols]:
            raise ValueError(f"{where} has an unknown protocol {unknown[0]!r}; known: {', '.join(self.protocols)}")
        model, files, _ = run = _run_of(label, given)
        if given.get("row"):
            others = [
                other for name, other in self.models.items() if other and not other.get("row") and _run_of(name, other) == run
            ]
            limits = {key: one.get(key) for one in others[:1] for key in ("seeds", "protocols")}
            given = limits | {key: value for key, value in given.items() if value is not None}
        tasks = []
        for protocol in given.get("protocols") or self.protocols:
            settings = self._settings(protocol, given.get("settings"))
            seeds = given.get("seeds") or self.seeds
            seeds = seeds[:1] if _is_one_file(model, settings, files) else seeds
            tasks += [Task(label, model, self.dataset, seed, protocol, settings, given.get("row"), files) for seed in seeds]
        return tasks

    def shortcuts(self, others: Sequence[Task]) -> list[Task]:
        """Those that stand beside the other tasks: the ones that the file does not list and that its data suit."""
        listed = {task.label for task in others} | {task.model for task in others}
        found = []
        for name in SHORTCUTS:
            for protocol in self.protocols if name not in listed else ():
                task = Task(name, name, self.dataset, self.seeds[0], protocol, self._settings(protocol))
                if reason := _unsuited(task, [other for other in others if other.protocol == protocol]):
                    logger.info(f"leaderboard: no row {name} ({protocol}), which {reason}")
                else:
                    found.append(task)
        return found

    def _settings(self, protocol: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return PropertyFiles().merge(self.settings, self.protocols[protocol], own or {}, self.changes)


def _run_of(label: str, given: Mapping[str, Any]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """What the runs of an entry are of: model, files, and the settings that can change a result."""
    files, settings = given.get("config_files") or (), given.get("settings") or {}
    files = tuple(files.split() if isinstance(files, str) else files)
    return str(given.get("model") or label), files, {key: settings[key] for key in settings if key not in BOOKKEEPING}


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
