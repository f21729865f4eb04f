"""Cells (one run each) -> a leaderboard: rows with means over seeds, paired tests between them, and what each cost.

A row is a label under a protocol. Its per-user values of the first metric, averaged over seeds, are tested against those of
every other row of the protocol; the p-values of the whole leaderboard are one Benjamini-Hochberg family. The tests speak of
users, with the seeds at hand taken as they are; the spread over seeds stands beside each mean. All metrics are taken to be
better when higher. Nothing of a single user is kept in the result.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from recbole_llm.evaluation import significance, slices

DONE, FAILED, WAITING = "done", "failed", "not run"
_HALF_WIDTH = "half_width_95"  # as run records call it
_AGREES = 1e-3  # a recorded metric and the mean over its ranks differ by less, rounding included


@dataclass(frozen=True)
class Cell:
    """One run of the leaderboard: what it was to be, and its record or the reason why there is none.

    Attributes:
        record: the JSON of the run record.
        error: why the cell failed; without record and error it has not run.
        note: search space and budget, or what else a reader of the row must know.
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

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``not run``."""
        return FAILED if self.error is not None else DONE if self.record is not None else WAITING


@dataclass(frozen=True)
class Outcome:
    """What a row tells of one of its cells."""

    seed: int
    status: str
    command: str
    commit: str | None
    error: str | None
    metrics: dict[str, float]


@dataclass
class Slice:
    """Users of a kind, as those with a cold target: how many, means over seeds, half widths of the 95 % intervals over users."""

    users: int | None
    metrics: dict[str, float]
    half_width: dict[str, float]


@dataclass
class Row:
    """A label under a protocol. What nobody recorded is None or absent.

    Attributes:
        letter: names the row in the superscripts of its protocol; empty where it has no result.
        metrics: means over seeds.
        half_width: of the 95 % t interval over seeds; None with one seed.
        interval: 95 % bootstrap interval over users of the first metric, averaged over seeds.
        p_values: adjusted, by the label of the other row.
        best: not significantly worse than the best row.
        beats: letters of the rows that are significantly worse.
        training_seconds: everything from scratch, mean over seeds; stages that were kept count with what they once took.
        training_at_least: some kept stage was trained outside of this leaderboard, so the cost is higher.
        candidates: SHA-256 of the candidate file.
    """

    label: str
    model: str
    cells: list[Outcome]
    letter: str = ""
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

    @property
    def seeds(self) -> list[int]:
        """Seeds with a result."""
        return [cell.seed for cell in self.cells if cell.status == DONE]

    @property
    def troubles(self) -> list[str]:
        """One line for each cell without a result."""
        told = {FAILED: "seed {0.seed} failed: {0.error}", WAITING: "seed {0.seed} has not run"}
        return [told[cell.status].format(cell) for cell in self.cells if cell.status != DONE]


@dataclass
class Table:
    """The rows of a protocol, best first.

    Attributes:
        metric: the one that sorts and is tested.
        metrics: all, in order; ``slices`` likewise.
        users: how many the tests compare.
        detectable: median smallest difference that 80 % of such experiments would find, of the best row against each other.
    """

    protocol: str
    metric: str | None
    metrics: list[str]
    slices: list[str]
    users: int | None
    candidates: str | None
    detectable: float | None
    rows: list[Row]


@dataclass
class Leaderboard:
    """Tables by protocol; ``alpha`` is the false discovery rate of all their tests, of which there are ``tests``."""

    title: str
    alpha: float
    tests: int
    tables: list[Table]


@dataclass(frozen=True)
class _Scores:
    """Per-user values [N] of the first metric, averaged over seeds, of users [N] in the order of their tokens."""

    users: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class _Pair:
    table: Table
    first: Row
    second: Row
    found: significance.Comparison


def build(
    cells: Sequence[Cell],
    *,
    title: str = "Leaderboard",
    metric: str | None = None,
    alpha: float = 0.05,
    flips: int = 10_000,
    seed: int = 2020,
) -> Leaderboard:
    """The leaderboard of ``cells``; ``metric`` sorts and is tested, by default the first of each protocol's results.

    Raises:
        ValueError: a cell is given twice; a label has two models; the rows of a protocol saw other candidates or users.
    """
    _check(cells)
    costs = _stage_costs(cells)
    tables, pairs = [], []
    for protocol in dict.fromkeys(cell.protocol for cell in cells):
        table, scores = _table(protocol, [cell for cell in cells if cell.protocol == protocol], metric, costs)
        tables.append(table)
        pairs += _pairs(table, scores, flips, seed)
    for pair, p in zip(pairs, significance.adjusted([pair.found.p_value for pair in pairs]).tolist(), strict=True):
        _judge(pair, p, alpha)
    for table in tables:
        _crown(table, [pair for pair in pairs if pair.table is table], alpha)
    return Leaderboard(title, alpha, len(pairs), tables)


# --- what is refused


def _check(cells: Sequence[Cell]) -> None:
    seen: set[tuple[str, str, int]] = set()
    models: dict[str, str] = {}
    for cell in cells:
        key = cell.label, cell.protocol, cell.seed
        if key in seen:
            raise ValueError(f"leaderboard: the cell {cell.label!r}, {cell.protocol}, seed {cell.seed} is given twice; keep one")
        if models.setdefault(cell.label, cell.model) != cell.model:
            raise ValueError(
                f"leaderboard: the label {cell.label!r} stands for {models[cell.label]} and {cell.model}; give each its own label"
            )
        seen.add(key)
    for protocol in dict.fromkeys(cell.protocol for cell in cells):
        _check_candidates(protocol, [cell for cell in cells if cell.protocol == protocol and cell.status == DONE])


def _check_candidates(protocol: str, cells: Sequence[Cell]) -> None:
    holders: dict[str, list[str]] = {}
    for cell in cells:
        digest = _candidates(cell.record)
        if digest:
            holders.setdefault(digest, []).append(f"{cell.label} (seed {cell.seed})")
    if len(holders) > 1:
        most, *others = sorted(holders, key=lambda digest: -len(holders[digest]))
        raise ValueError(
            f"leaderboard: {protocol}: {', '.join(holders[others[0]])} ranked the candidates {others[0]}, "
            f"but {', '.join(holders[most])} ranked {most}; such results cannot stand in one table: run them on the same "
            "candidates, or give them another protocol"
        )


# --- rows


def _table(
    protocol: str, cells: Sequence[Cell], metric: str | None, costs: Mapping[str, float]
) -> tuple[Table, dict[str, _Scores]]:
    """A protocol's table without its tests, and the per-user values by label."""
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    rows = [_row(own, costs) for own in by_label.values()]
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    first = metric if metric in metrics else next(iter(metrics), None)
    rows.sort(key=lambda row: (-row.metrics.get(first or "", -math.inf), row.label))
    for place, row in enumerate(row for row in rows if row.metrics):
        row.letter = _letter(place)
    scores = {label: found for label, own in by_label.items() if first and (found := _scores(own, first))}
    users = _same_users(protocol, scores)
    for row in rows:
        if row.label in scores and users and users > 1:
            row.interval = list(significance.interval(scores[row.label].values))
    kinds = list(dict.fromkeys(name for row in rows for name in row.slices))
    digest = next((row.candidates for row in rows if row.candidates), None)
    return Table(protocol, first, metrics, kinds, users, digest, None, rows), scores


def _row(cells: Sequence[Cell], costs: Mapping[str, float]) -> Row:
    cells = sorted(cells, key=lambda cell: cell.seed)
    records = [cell.record for cell in cells if cell.status == DONE and cell.record is not None]
    own = [_metrics(record, cells[0].model) for record in records]
    row = Row(cells[0].label, cells[0].model, [_outcome(cell) for cell in cells])
    for name in dict.fromkeys(name for metrics in own for name in metrics):
        values = [metrics[name] for metrics in own if name in metrics]
        row.metrics[name], row.half_width[name] = float(np.mean(values)), _t_half_width(values)
    row.slices = _slices(records, cells[0].model)
    row.backbone = _first(record.get("backbone") for record in records)
    row.backbone_fingerprint = _first(record.get("backbone_fingerprint") for record in records)
    row.candidates = _first(map(_candidates, records))
    row.note = _first(cell.note for cell in cells)
    row.trained_parameters = max(_numbers(record.get("trained_parameters") for record in records), default=None)
    row.peak_memory_bytes = max(_numbers(record.get("peak_memory_bytes") for record in records), default=None)
    row.users_per_second = _mean(_numbers(record.get("users_per_second") for record in records))
    training = [found for record in records if (found := _training(record, costs))]
    row.training_seconds = _mean([seconds for seconds, _ in training])
    row.training_at_least = any(at_least for _, at_least in training)
    return row


def _outcome(cell: Cell) -> Outcome:
    metrics = _metrics(cell.record, cell.model) if cell.status == DONE else {}
    return Outcome(cell.seed, cell.status, cell.command, cell.commit, cell.error, metrics)


def _metrics(record: Mapping[str, Any] | None, model: str) -> dict[str, float]:
    values = _dig(record, "results", model)
    return {str(name): number for name, value in values.items() if (number := _number(value)) is not None}


def _slices(records: Sequence[Mapping[str, Any]], model: str) -> dict[str, Slice]:
    """Means over seeds; the half widths are over users, and averaged too."""
    found: dict[str, Slice] = {}
    parts = [_dig(record, "slices", model) for record in records]
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [dict(_dig(part, name)) for part in parts if name in part]
        users = _first(_number(part.pop("users", None)) for part in own)
        half_widths = [_dig(part, _HALF_WIDTH) for part in own]
        found[str(name)] = Slice(None if users is None else int(users), _means(own), _means(half_widths))
    return found


def _t_half_width(values: Sequence[float]) -> float | None:
    """Half width of the 95 % t interval of a mean over seeds; None of one."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def _letter(place: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    letters = ""
    while place >= 0:
        place, digit = divmod(place, 26)
        letters, place = string.ascii_lowercase[digit] + letters, place - 1
    return letters


# --- what training cost


def _stage_costs(cells: Iterable[Cell]) -> dict[str, float]:
    """Seconds of each stage folder, from whichever record trained it: the others, which found it there, say 0."""
    costs: dict[str, float] = {}
    for cell in cells:
        if cell.record is None or cell.status != DONE:
            continue
        for stage, folder in _dig(cell.record, "stages").items():
            seconds = _number(_dig(cell.record, "stage_seconds").get(stage))
            if seconds is not None:
                costs[str(folder)] = max(costs.get(str(folder), 0.0), seconds)
    return costs


def _training(record: Mapping[str, Any], costs: Mapping[str, float]) -> tuple[float, bool] | None:
    """Seconds to train a run from scratch, and whether more than these are missing from it; None where no time is recorded."""
    own = {stage: number for stage, value in _dig(record, "stage_seconds").items() if (number := _number(value)) is not None}
    measured = _number(_dig(record, "seconds").get("train"))
    if measured is None and not own:
        return None
    full = {stage: max(seconds, costs.get(str(_dig(record, "stages").get(stage)), 0.0)) for stage, seconds in own.items()}
    outside = max((measured or 0.0) - sum(own.values()), 0.0)
    return outside + sum(full.values()), any(seconds == 0 for seconds in full.values())


# --- tests


def _scores(cells: Sequence[Cell], metric: str) -> _Scores | None:
    """Per-user values of a row; None unless every finished cell has ranks that give its recorded metric."""
    done = [cell for cell in cells if cell.status == DONE]
    found = {f"seed {cell.seed}": own for cell in done if (own := _cell_scores(cell, metric))}
    if not found or len(found) < len(done):
        return None
    _same_users(f"{cells[0].protocol}: {cells[0].label}", found)
    return _Scores(next(iter(found.values())).users, np.mean([own.values for own in found.values()], axis=0))


def _cell_scores(cell: Cell, metric: str) -> _Scores | None:
    ranks = _dig(cell.record, "ranks", cell.model)
    recorded = _metrics(cell.record, cell.model).get(metric)
    users = sorted(ranks)
    places = [_number(ranks[user]) for user in users]
    if recorded is None or not users or None in places:
        return None
    distinct, where = np.unique(np.array(places, dtype=np.float64), return_inverse=True)
    gains = [slices.metrics([rank], [metric]).get(metric) for rank in distinct.tolist()]  # of one user: the value itself
    if None in gains:
        return None
    values = np.array(gains, dtype=np.float64)[where]
    return _Scores(tuple(users), values) if abs(values.mean() - recorded) <= _AGREES else None


def _same_users(what: str, scores: Mapping[str, _Scores]) -> int | None:
    """How many users all of ``scores`` are about; None without any."""
    if not scores:
        return None
    (name, one), *others = scores.items()
    for other_name, other in others:
        if other.users != one.users:
            odd = sorted(set(one.users) ^ set(other.users))
            raise ValueError(
                f"leaderboard: {what}: {name} ({len(one.users)} users) and {other_name} ({len(other.users)} users) did not rank "
                f"the same users ({odd[0]!r} is in one only); run them on the same data, or give them another protocol"
            )
    return len(one.users)


def _pairs(table: Table, scores: Mapping[str, _Scores], flips: int, seed: int) -> list[_Pair]:
    """Every two rows of a table that ranked the same candidates, tested."""
    rows = [row for row in table.rows if row.label in scores]
    return [
        _Pair(
            table,
            first,
            second,
            significance.compare(scores[first.label].values, scores[second.label].values, flips=flips, seed=seed),
        )
        for first, second in combinations(rows, 2)
        if first.candidates == second.candidates
    ]


def _judge(pair: _Pair, p: float, alpha: float) -> None:
    pair.first.p_values[pair.second.label] = pair.second.p_values[pair.first.label] = p
    if p < alpha and pair.found.higher:
        winner, loser = (pair.first, pair.second) if pair.found.higher == "first" else (pair.second, pair.first)
        winner.beats.append(loser.letter)


def _crown(table: Table, pairs: Sequence[_Pair], alpha: float) -> None:
    """Flag the best row and those not significantly worse; say what difference against it can be found."""
    rows = [row for row in table.rows if table.metric in row.metrics]
    if not rows:
        return
    top = rows[0]
    for row in rows:
        row.best = row is top or row.p_values.get(top.label, 0.0) >= alpha
        row.beats.sort(key=lambda letter: (len(letter), letter))
    found = [pair.found for pair in pairs if top is pair.first or top is pair.second]
    sizes = [significance.detectable_difference(one.deviation, one.users) for one in found]
    table.detectable = float(np.median(sizes)) if sizes else None


# --- reading records that may lack anything


def _dig(value: Any, *keys: Any) -> Mapping[Any, Any]:
    """The mapping at ``keys``, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _candidates(record: Mapping[str, Any] | None) -> str | None:
    digest = _dig(record, "candidates_sha256").get("test")
    return digest if isinstance(digest, str) else None


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _numbers(values: Iterable[Any]) -> list[float]:
    return [number for value in values if (number := _number(value)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _means(parts: Sequence[Mapping[Any, Any]]) -> dict[str, float]:
    """Mean of each number that stands in any of ``parts``."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {str(name): mean for name in names if (mean := _mean(_numbers(part.get(name) for part in parts))) is not None}


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
