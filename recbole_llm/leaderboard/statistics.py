"""Build a leaderboard from cells (one run each): means over seeds, paired tests between rows, and costs.

A row is a label under a protocol. Its per-user values of the first metric, averaged over seeds, are tested against those of
every other row of the protocol; the p-values of the whole leaderboard are one Benjamini-Hochberg family. The tests are over
users, given the seeds; the interval over seeds is shown with each mean. The result
has no data of single users.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from recbole_llm.evaluation import significance
from recbole_llm.leaderboard import comparable
from recbole_llm.leaderboard.headroom import add_headroom
from recbole_llm.leaderboard.per_user import PerUser, mean_over_seeds, per_user
from recbole_llm.leaderboard.protocol import measured
from recbole_llm.leaderboard.table import BETWEEN, DONE, Cell, Leaderboard, Outcome, Row, Slice, Table, smaller_is_better


@dataclass(frozen=True)
class _Pair:
    first: Row
    second: Row
    found: significance.Comparison


@dataclass(frozen=True)
class _Scores:
    """The per-user values of a row: their mean over seeds, and of each seed, with its targets and candidates."""

    mean: PerUser
    by_seed: Mapping[int, PerUser]
    ranked: Mapping[int, tuple[str | None, ...]]

    def beside(self, other: _Scores) -> tuple[np.ndarray, np.ndarray] | None:
        """Values [N] of both rows on the same items: the means, or if seeds have their own, those of common seeds."""
        if len({*self.ranked.values(), *other.ranked.values()}) == 1:
            return self.mean.values, other.mean.values
        common = [seed for seed, items in self.ranked.items() if seed in other.by_seed and other.ranked[seed] == items]
        both = [np.mean([row.by_seed[seed].values for seed in common], axis=0) for row in (self, other) if common]
        return (both[0], both[1]) if both else None


def build(
    cells: Sequence[Cell], title: str = "Leaderboard", *, metric: str | None = None, alpha: float = 0.05, flips: int = 10_000
) -> Leaderboard:
    """The leaderboard of ``cells``; ``metric``, by default the first of each protocol, sorts the rows and is tested.

    Raises:
        ValueError: a cell is given twice, a label has two models, or the rows of a protocol are not comparable.
    """
    _check(cells)
    costs = _stage_costs(cells)
    tables, pairs = [], []
    for protocol, own in _by("protocol", cells).items():
        table, scores = _table(protocol, own, metric, costs)
        tables.append(table)
        pairs += _pairs(table.rows, scores, flips)
    for pair, p in zip(pairs, significance.adjusted([pair.found.p_value for pair in pairs]).tolist(), strict=True):
        _judge(pair, p, alpha)
    for table in tables:
        _compare_with_best(table, pairs, alpha)
        add_headroom(table, _differences(table, pairs))
    return Leaderboard(title, alpha, len(pairs), tables)


def _by(name: str, cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(getattr(cell, name), []).append(cell)
    return groups


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
    for protocol, own in _by("protocol", cells).items():
        comparable.check(f"leaderboard: {protocol}", own)


def _table(
    protocol: str, cells: Sequence[Cell], metric: str | None, costs: Mapping[str, float]
) -> tuple[Table, dict[str, _Scores]]:
    """The table of a protocol without tests, and the per-user values by label."""
    by_label = _by("label", cells)
    rows = [_row(own, costs) for own in by_label.values()]
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    first = metric if metric in metrics else next(iter(metrics), None)
    sign = -1 if smaller_is_better(first) else 1
    rows.sort(key=lambda row: (-sign * row.metrics[first] if first in row.metrics else math.inf, row.label))
    for place, row in enumerate(row for row in rows if row.metrics):
        row.mark = _mark(place)
    scores = {label: found for label, own in by_label.items() if first and (found := _scores(own, first))}
    users = comparable.same_users(f"leaderboard: {protocol}", {label: own.mean.users for label, own in scores.items()})
    for row in rows:
        if row.label in scores and users and users > 1:
            row.interval = list(significance.interval(scores[row.label].mean.values))
    names = list(dict.fromkeys(name for row in rows for name in row.slices))
    how = measured([cell.record for cell in cells if cell.status == DONE and cell.record is not None])
    drawn = _joined(digest for row in rows for digest in (row.candidates or "").split(BETWEEN))
    return Table(protocol, first, metrics, names, users, drawn, how, None, rows), scores


def _row(cells: Sequence[Cell], costs: Mapping[str, float]) -> Row:
    cells = sorted(cells, key=lambda cell: cell.seed)
    model = cells[0].model
    records = [cell.record for cell in cells if cell.status == DONE and cell.record is not None]
    own = [_numbers(_dig(cell.record, "results", model)) if cell.status == DONE else {} for cell in cells]
    about = [(cell.seed, cell.status, cell.command, cell.commit, cell.error) for cell in cells]
    seeds = pd.DataFrame(own)  # [seeds, metrics]
    facts = pd.DataFrame([_numbers(record) for record in records])  # [seeds, numbers of the records]
    training = [found for record in records if (found := _training(record, costs))]
    return Row(
        cells[0].label,
        model,
        [Outcome(*facts, found) for facts, found in zip(about, own, strict=True)],
        metrics=_means(own),
        half_width={name: _t_half_width(seeds[name].dropna()) for name in seeds},
        slices=_slices([_dig(record, "slices", model) for record in records]),
        backbone=_first(record.get("backbone") for record in records),
        backbone_fingerprint=_first(record.get("backbone_fingerprint") for record in records),
        trained_parameters=float(facts["trained_parameters"].max()) if "trained_parameters" in facts else None,
        training_seconds=float(np.mean([seconds for seconds, _ in training])) if training else None,
        training_at_least=any(at_least for _, at_least in training),
        users_per_second=float(facts["users_per_second"].mean()) if "users_per_second" in facts else None,
        peak_memory_bytes=float(facts["peak_memory_bytes"].max()) if "peak_memory_bytes" in facts else None,
        candidates=_joined(map(comparable.candidates, records)),
        note=_note(cells),
        shortcut=any(record.get("shortcut") is True for record in records),
        memorisation=_first(record.get("memorisation") for record in records),
        routing=_first(record.get("routing") for record in records if record.get("model") == model),
    )


def _slices(parts: Sequence[Mapping[Any, Any]]) -> dict[str, Slice]:
    """Means over seeds, of the half widths over users too."""
    found: dict[str, Slice] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [_numbers(_dig(part, name)) for part in parts if name in part]
        users = _first([part.pop("users", None) for part in own])
        half_widths = [_numbers(_dig(part, name, "half_width_95")) for part in parts]
        found[str(name)] = Slice(None if users is None else int(users), _means(own), _means(half_widths))
    return found


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over those of ``parts`` that have it."""
    return {str(name): float(mean) for name, mean in pd.DataFrame(parts).mean().items()}


def _t_half_width(values: pd.Series) -> float | None:
    """Half width of the 95 % t interval of a mean over seeds [S]; None for one seed, or if nothing depends on the seed."""
    if values.nunique() < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values.to_numpy(), ddof=1) / math.sqrt(len(values)))


def _mark(place: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    mark = ""
    while place >= 0:
        place, digit = divmod(place, 26)
        mark, place = string.ascii_lowercase[digit] + mark, place - 1
    return mark


def _stage_costs(cells: Iterable[Cell]) -> dict[str, float]:
    """Seconds by stage folder, from the record that trained it; a record that reused it has 0."""
    costs: dict[str, float] = {}
    for cell in cells:
        if cell.status == DONE:
            seconds = _numbers(_dig(cell.record, "stage_seconds"))
            for stage, folder in _dig(cell.record, "stages").items():
                costs[str(folder)] = max(costs.get(str(folder), 0.0), seconds.get(str(stage), 0.0))
    return costs


def _training(record: Mapping[str, Any], costs: Mapping[str, float]) -> tuple[float, bool] | None:
    """Seconds to train a run from scratch, and whether those of a stage are missing; None if no time is recorded."""
    own = _numbers(_dig(record, "stage_seconds"))
    measured = _numbers(_dig(record, "seconds")).get("train")
    if measured is None and not own:
        return None
    full = {stage: max(seconds, costs.get(str(_dig(record, "stages").get(stage)), 0.0)) for stage, seconds in own.items()}
    outside = max((measured or 0.0) - sum(own.values()), 0.0)
    return outside + sum(full.values()), any(seconds == 0 for seconds in full.values())


def _joined(digests: Iterable[str | None]) -> str | None:
    """Each SHA-256 once; None without any."""
    return BETWEEN.join(dict.fromkeys(filter(None, digests))) or None


def _scores(cells: Sequence[Cell], metric: str) -> _Scores | None:
    """Per-user values of a row; None unless every finished cell has ranks that agree with its recorded metric."""
    done = [cell for cell in cells if cell.status == DONE and cell.record is not None]
    found = {cell.seed: per_user(cell.record or {}, cell.model, metric) for cell in done}
    mean = mean_over_seeds(f"{cells[0].protocol}: {cells[0].label}", found)
    known = {seed: values for seed, values in found.items() if values is not None}
    ranked = {cell.seed: comparable.ranked_items(cell.record) for cell in done}
    return None if mean is None else _Scores(mean, known, ranked)


def _pairs(rows: Sequence[Row], scores: Mapping[str, _Scores], flips: int) -> list[_Pair]:
    """Test every pair of rows with the same candidates."""
    found = []
    for one, other in combinations([row for row in rows if row.label in scores], 2):
        if values := scores[one.label].beside(scores[other.label]):
            found.append(_Pair(one, other, significance.compare(*values, flips=flips)))
    return found


def _differences(table: Table, pairs: Sequence[_Pair]) -> dict[tuple[str, str], float]:
    """The first metric of a row minus that of another one as they are tested, by both labels."""
    own = [pair for pair in pairs if any(pair.first is row for row in table.rows)]
    found = {(pair.first.label, pair.second.label): pair.found.difference for pair in own}
    return found | {(second, first): -difference for (first, second), difference in found.items()}


def _judge(pair: _Pair, p: float, alpha: float) -> None:
    pair.first.p_values[pair.second.label] = pair.second.p_values[pair.first.label] = p
    if p < alpha and pair.found.higher:
        winner, loser = (pair.first, pair.second) if pair.found.higher == "first" else (pair.second, pair.first)
        winner.beats.append(loser.mark)


def _compare_with_best(table: Table, pairs: Sequence[_Pair], alpha: float) -> None:
    """Mark the best row and those not significantly worse, unless nothing is tested; set the detectable difference."""
    top, *others = table.rows
    tested = bool(top.p_values) or not any(table.metric in row.metrics for row in others)
    for row in table.rows:
        close = row is top or row.p_values.get(top.label, 0.0) >= alpha
        row.best = tested and close and table.metric in row.metrics
        row.beats.sort(key=lambda mark: (len(mark), mark))
    found = [pair.found for pair in pairs if top is pair.first or top is pair.second]
    sizes = [significance.detectable_difference(one.deviation, one.users) for one in found if one.deviation > 0]
    table.detectable = float(np.median(sizes)) if sizes else None


def _dig(value: Any, *keys: Any) -> Mapping[Any, Any]:
    """The mapping at ``keys``, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """The finite numbers of a mapping."""
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {str(key): float(value) for key, value in numbers.items() if math.isfinite(value)}


def _note(cells: Sequence[Cell]) -> str | None:
    note, other = _first(cell.note for cell in cells), [str(cell.seed) for cell in cells if cell.other_code]
    older = f"written by other code, and run again without --show (seed{'s' * (len(other) > 1)} {', '.join(other)})"
    return "; ".join(filter(None, [note, older if other else None])) or None


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
