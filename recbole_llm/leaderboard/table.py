"""The content of a leaderboard, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from recbole.evaluator import smaller_metrics

DONE, FAILED, WAITING = "done", "failed", "not run"
BETWEEN = ", "  # the candidates of several seeds, if they are not the same


@dataclass(frozen=True)
class Cell:
    """One run: its command, and its record or the reason why there is none.

    Attributes:
        record: the JSON of the run record.
        error: the reason of a failure; without record and error, the cell has not run.
        note: a remark on the row, such as search space and budget.
        other_code: the record was written by other code than would run now.
    """

    label: str
    model: str
    seed: int
    protocol: str
    command: str
    record: dict[str, Any] | None = None
    error: str | None = None
    commit: str | None = None
    note: str | None = None
    other_code: bool = False

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``not run``."""
        return FAILED if self.error is not None else DONE if self.record is not None else WAITING


@dataclass(frozen=True)
class Outcome:
    """The outcome of one cell of a row."""

    seed: int
    status: str
    command: str
    commit: str | None
    error: str | None
    metrics: dict[str, float]


@dataclass
class Slice:
    """A subset of users: their number, means over seeds, half widths of the 95 % intervals over users."""

    users: int | None
    metrics: dict[str, float]
    half_width: dict[str, float]


@dataclass
class Row:
    """A label under a protocol. Values that were not recorded are None or absent.

    Attributes:
        mark: the name of the row in superscripts, such as ``a``; empty without a result.
        metrics: means over seeds.
        half_width: of the 95 % t interval over seeds; None with one seed, or if all seeds have one value.
        interval: 95 % bootstrap interval over users of the first metric, averaged over seeds.
        p_values: adjusted, by the label of the other row.
        best: not significantly worse than the best row.
        beats: marks of the rows that are significantly worse.
        training_seconds: from scratch, mean over seeds; a reused stage counts with its training time.
        training_at_least: a stage was trained outside this leaderboard, so the true time is longer.
        candidates: SHA-256 of the candidate file; of several seeds with other candidates, those of all, separated by commas.
        shortcut: an untrained rule, with which the other rows are compared.
        headroom: how much better the first metric is than that of the best shortcut of the table; None for a shortcut or
            without one.
        headroom_p: adjusted p-value of the headroom, see :func:`~recbole_llm.leaderboard.headroom.add_headroom`.
        memorisation: of the run record, see :func:`recbole_llm.llm.memorisation.memorisation`; None if it was not measured.
        routing: of the run record of a cascade, first seed, see :meth:`recbole_llm.model.cascade.Cascade.findings`.
    """

    label: str
    model: str
    cells: list[Outcome]
    mark: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    half_width: dict[str, float | None] = field(default_factory=dict)
    interval: list[float] | None = None
    p_values: dict[str, float] = field(default_factory=dict)
    best: bool = False
    beats: list[str] = field(default_factory=list)
    slices: dict[str, Slice] = field(default_factory=dict)
    backbone: str | None = None
    backbone_fingerprint: str | None = None
    trained_parameters: float | None = None
    training_seconds: float | None = None
    training_at_least: bool = False
    users_per_second: float | None = None
    peak_memory_bytes: float | None = None
    candidates: str | None = None
    note: str | None = None
    shortcut: bool = False
    headroom: float | None = None
    headroom_p: float | None = None
    memorisation: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None

    @property
    def seeds(self) -> list[int]:
        """Seeds with a result."""
        return [cell.seed for cell in self.cells if cell.status == DONE]

    @property
    def troubles(self) -> list[str]:
        """One line for each cell without a result."""
        lines = {FAILED: "seed {0.seed} failed: {0.error}", WAITING: "seed {0.seed} has not run"}
        return [lines[cell.status].format(cell) for cell in self.cells if cell.status != DONE]


@dataclass
class Table:
    """The rows of a protocol, best first.

    Attributes:
        metric: sorts the rows and is tested.
        users: number of users that the tests compare.
        measured: how the targets were ranked, see :func:`recbole_llm.leaderboard.protocol.measured`.
        detectable: smallest difference that is detected with a power of 80 %, median over the tests of the best row; None
            without a test in which the differences of the users vary.
    """

    protocol: str
    metric: str | None
    metrics: list[str]
    slices: list[str]
    users: int | None
    candidates: str | None
    measured: dict[str, Any]
    detectable: float | None
    rows: list[Row]

    @property
    def candidates_differ(self) -> bool:
        """Whether each seed has its own candidates."""
        return BETWEEN in (self.candidates or "")

    @property
    def shortcuts(self) -> list[Row]:
        """The shortcut rows with a first metric, the best one first."""
        return [row for row in self.rows if row.shortcut and self.metric in row.metrics]


@dataclass
class Leaderboard:
    """A table for each protocol; ``alpha`` is the false discovery rate over all ``tests`` tests."""

    title: str
    alpha: float
    tests: int
    tables: list[Table]

    @property
    def failed(self) -> int:
        """Number of failed cells."""
        return sum(cell.status == FAILED for table in self.tables for row in table.rows for cell in row.cells)


def smaller_is_better(metric: str | None) -> bool:
    """Whether the smaller value of a metric of RecBole is the better one, as of ``logloss`` and ``giniindex@10``."""
    return (metric or "").partition("@")[0] in smaller_metrics


def to_json(leaderboard: Leaderboard) -> str:
    """The leaderboard as strict JSON."""
    return json.dumps(asdict(leaderboard), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> Leaderboard:
    """Read the output of :func:`to_json`.

    Raises:
        ValueError: the text is not a leaderboard.
    """

    def row(content: dict[str, Any]) -> Row:
        slices = {name: Slice(**part) for name, part in content["slices"].items()}
        return Row(**content | {"cells": [Outcome(**cell) for cell in content["cells"]], "slices": slices})

    try:
        content = json.loads(text)
        tables = [Table(**table | {"rows": [row(line) for line in table["rows"]]}) for table in content["tables"]]
        return Leaderboard(**content | {"tables": tables})
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the content of a leaderboard.json ({error}); run recbole-llm leaderboard again") from error
