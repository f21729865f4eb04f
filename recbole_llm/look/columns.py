"""The columns of the page: rows of finished runs that were measured alike, each with a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recbole_llm.data import passport as passports
from recbole_llm.evaluation.record_files import ranks_of, read_record
from recbole_llm.leaderboard import comparable
from recbole_llm.leaderboard.table import Cell
from recbole_llm.store.runs import record_file

_APART = "give them a page of their own"


@dataclass(frozen=True)
class Column:
    """A row of a run's table.

    Attributes:
        name: as the page shows it.
        path: the record of the run.
        record: its content.
        row: the name of the row in the record.
    """

    name: str
    path: Path
    record: Mapping[str, Any]
    row: str

    @cached_property
    def ranks(self) -> dict[str, float]:
        """The rank of the target by user, infinite for a missed target."""
        return ranks_of(self.record, self.row)

    @property
    def is_model(self) -> bool:
        """Whether the row is the model itself, not one of the rows beside it."""
        return self.row == self.record["model"]


def read_columns(given: Sequence[str], rows: Sequence[str] = ()) -> list[Column]:
    """The columns of runs.

    Args:
        given: a run's folder or its record.json each, with a name if it is to have another one than its model: ``NAME=RUN``.
        rows: names of rows that are shown, too, for each run that has them.

    Raises:
        ValueError: there is no such run, a record is damaged, no run has such a row, a run has no rank for each user, or the runs
            were not measured alike; names the runs.
    """
    runs = [(name, path, read_record(path)) for name, path in map(_named, given)]
    if repeated := [path for path, number in Counter(path for _, path, _ in runs).items() if number > 1]:
        raise ValueError(f"--runs: {repeated[0].parent} is given twice")
    if unknown := [path for _, path, record in runs if record.get("user_ids") is False]:
        raise ValueError(f"--runs: {unknown[0]} was shared without the ids of its users; ask for one shared with --user_ids")
    found = []
    for (_, path, record), name in zip(runs, _names(runs), strict=True):
        found.append(Column(name, path, record, record["model"]))
        others = [row for row in rows if row in record["results"] and row != record["model"]]
        found += [Column(f"{name}, {row}", path, record, row) for row in others]
    for row in rows:
        if not any(column.row == row for column in found):
            known = dict.fromkeys(row for *_, record in runs for row in record["results"])
            raise ValueError(f"--rows={row}: no run has such a row; they have: {', '.join(known)}")
    if names := [name for name, number in Counter(column.name for column in found).items() if number > 1]:
        raise ValueError(f"--runs: {names[0]} is the name of two columns; name the runs, as NAME=RUN")
    check(found)
    return found


def _named(given: str) -> tuple[str | None, Path]:
    """The name that was given to a run, and its record."""
    name, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        return None, record_file(given, "--runs")
    if not name.strip():
        raise ValueError(f"--runs={given}: the name is empty; give NAME=RUN, or RUN")
    return name.strip(), record_file(path, "--runs")


def _names(runs: Sequence[tuple[str | None, Path, Mapping[str, Any]]]) -> list[str]:
    """The given name, the model, or if another run has that model its seed, too, or the name of its folder."""
    forms = (
        lambda record, _: str(record["model"]),
        lambda record, _: f"{record['model']} (seed {record['seed']})",
        lambda _, path: str(path.parent.name),
    )
    names = [name or forms[0](record, path) for name, path, record in runs]
    for form in forms[1:]:
        counts = Counter(names)
        names = [
            form(record, path) if given is None and counts[name] > 1 else name
            for (given, path, record), name in zip(runs, names, strict=True)
        ]
    return names


def check(columns: Sequence[Column]) -> None:
    """Refuse columns without ranks by user, and those that were not measured alike.

    Raises:
        ValueError: names the columns, and what to do.
    """
    for column in columns:
        if not column.ranks:
            raise ValueError(
                f"look: {column.path} has no rank of each user in its row {column.row}: users have several test items, or it was "
                "evaluated by labels; give runs with one test item for each user"
            )
    cells = [_cell(column) for column in columns]
    comparable.check("look", cells, _APART)
    first, *others = columns
    for other in others:  # of random splits, those of other seeds
        one, two = (column.record["passport"] for column in (other, first))
        if passports.identity(one) != passports.identity(two):
            how = "; ".join(passports.differences(one, two))
            raise ValueError(f"look: the split of {other.name} is not that of {first.name}: {how}; {_APART}")
    comparable.same_items("look", {cell.label: [comparable.ranked_items(cell.record)] for cell in cells}, _APART)
    comparable.same_users("look", {column.name: sorted(column.ranks) for column in columns}, _APART)


def _cell(column: Column) -> Cell:
    record = column.record
    command = f"recbole-llm run --model={record['model']} --dataset={record['dataset']}"
    return Cell(column.name, str(record["model"]), record["seed"], "", command, dict(record))
