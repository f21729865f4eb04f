"""A task of a leaderboard, an ordinary run: its command, its record, and whether that is of the present code and data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recbole_llm.classical import record_inputs
from recbole_llm.classical.record_code import record_code
from recbole_llm.config import LLMConfig
from recbole_llm.config.property_files import PropertyFiles
from recbole_llm.config.values import parse_value
from recbole_llm.evaluation import predictions
from recbole_llm.evaluation.record_files import DamagedRecordError, read_record
from recbole_llm.leaderboard.table import Cell

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


def _literal(value: Any) -> str:
    """The text of a command line that is read as ``value`` again."""
    return value if isinstance(value, str) and parse_value(value) == value else repr(value)
