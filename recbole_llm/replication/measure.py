"""The result of a claim's test, from the run records of its rows: aggregates over users, nothing of a single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from recbole_llm.config.key_groups import BOOKKEEPING
from recbole_llm.config.values import plain
from recbole_llm.evaluation import metrics, significance
from recbole_llm.evaluation.published import PREFIX, in_recbole
from recbole_llm.leaderboard import comparable
from recbole_llm.leaderboard.per_user import mean_over_seeds, per_user
from recbole_llm.leaderboard.table import DONE, FAILED, Cell
from recbole_llm.leaderboard.task import Task
from recbole_llm.replication.claims import Board, Claim, Side

FLIPS = 400_000
"""Sign patterns of a sampled test: at p = .025 its standard error is .00025, so that the draw decides no verdict."""


class NotMeasuredError(ValueError):
    """The runs of a claim do not give a result; says why."""


@dataclass(frozen=True)
class _Runs:
    """The finished runs of a claim's rows, by label and seed."""

    claim: Claim
    cells: Mapping[str, Mapping[int, Cell]]
    seeds: tuple[int, ...]

    def used(self, label: str) -> dict[int, Cell]:
        """The runs of a row that a test reads, by seed: a row of one seed stands beside all seeds."""
        return {seed: cell for seed, cell in self.cells[label].items() if seed in self.seeds or len(self.cells[label]) == 1}

    def values(self, label: str, metric: str) -> np.ndarray:
        """Values [N] of a row, averaged over seeds."""
        own = self.used(label)
        found = {seed: per_user(cell.record or {}, cell.model, metric, self.claim.slice) for seed, cell in own.items()}
        values = mean_over_seeds(f"{self.claim.protocol}: {label}", found)
        if values is None:
            where = f" in the slice {self.claim.slice}" if self.claim.slice else ""
            raise NotMeasuredError(f"the record of {label} has no values of users for {metric}{where}")
        return values.values

    def users(self) -> dict[str, tuple[str, ...]]:
        """The users that each row ranked."""
        found: dict[str, tuple[str, ...]] = {}
        for label in self.cells:
            for cell in self.used(label).values():
                values = per_user(cell.record or {}, cell.model, self.claim.metric, self.claim.slice)
                found |= {f"{label}, seed {cell.seed}": values.users} if values else {}
        return found

    def ranked_items(self) -> dict[str, list[tuple[str | None, ...]]]:
        """The targets and candidates of each row, by seed."""
        return {label: [comparable.ranked_items(cell.record) for cell in self.used(label).values()] for label in self.cells}

    @property
    def _record(self) -> Mapping[str, Any]:
        """One of them: all rank the same items."""
        return next(cell.record for own in self.cells.values() for cell in own.values()) or {}

    def expected(self, first: int) -> float:
        """Expected value of the metric for a target whose rank is random from ``first`` on."""
        record = self._record
        drawn = (record.get("config") or {}).get("candidates") or {}
        known = drawn.get("source") in ("uniform", "popularity") and isinstance(drawn.get("num_negatives"), int)
        if comparable.candidates(record) is None or not known:  # a retriever may miss the target, a file may have any number
            raise NotMeasuredError("chance is known for drawn candidates alone, not for a full ranking, a retriever or a file")
        name = in_recbole(self.claim.metric)
        return metrics.metrics(range(first, drawn["num_negatives"] + 2), [name])[name]

    def chance(self) -> float | None:
        """Expected value of the metric of a random ranking, a little too low for a full one without the history; or None."""
        items = ((self._record.get("passport") or {}).get("counts") or {}).get("items")
        if comparable.candidates(self._record) is None and isinstance(items, int):
            name = in_recbole(self.claim.metric)
            return metrics.metrics(range(1, items + 1), [name])[name]
        try:
            return self.expected(1)
        except NotMeasuredError:
            return None

    def side(self, side: Side) -> np.ndarray | float:
        """Values [N] of a side, or the number that holds for all users."""
        if side.label is None:
            return self.expected(1) if side.number is None else side.number
        if not side.after_first:
            return self.values(side.label, self.claim.metric)
        first = self.values(side.label, f"{PREFIX}hr@1" if self.claim.metric.startswith(PREFIX) else "hit@1")  # [N]
        return first + (1 - first) * self.expected(2)


def measure(board: Board, claim: Claim, cells: Mapping[Task, Cell], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a claim, as it stands in ``replication.json``.

    Args:
        cells: of the board, by task.
        changes: keys of the command line; those that change results are part of the result.

    Raises:
        NotMeasuredError: a run is missing or failed, its record lacks what the test reads, or the runs cannot be compared.
    """
    own = {task: cell for task, cell in cells.items() if task.label in claim.labels and task.protocol == claim.protocol}
    runs = _finished(claim, own)
    used = {task: cell for task, cell in own.items() if cell.status == DONE and cell.seed in runs.used(task.label)}
    try:
        comparable.check(f"leaderboard: {claim.protocol}", list(used.values()))
        comparable.same_users(f"leaderboard: {claim.protocol}", runs.users())
        comparable.same_items(f"leaderboard: {claim.protocol}", runs.ranked_items())
        tests = [_recorded(cells, runs, *pair) if any(side.path for side in pair) else _test(runs, *pair) for pair in claim.pairs]
    except ValueError as error:  # such runs are the claim's alone
        raise NotMeasuredError(str(error)) from error
    records = {task.record: task.read() or {} for task in used}
    seconds = [_numbers(record.get("seconds")) for record in records.values()]
    reused = any(0.0 in _numbers(record.get("stage_seconds")).values() for record in records.values())
    shown = {key: value for key, value in changes.items() if key not in BOOKKEEPING}
    return {
        "fingerprint": board.fingerprint(claim),
        "claim": claim.as_dict(),
        "dataset": board.dataset,
        "changes": plain(shown),
        "seeds": list(runs.seeds),
        "planned_seeds": list(board.seeds),
        "backbone": next((record["backbone"] for record in records.values() if record.get("backbone")), None),
        "candidates": next(map(comparable.candidates, records.values())),
        "tests": tests,
        "facts": {name: _fact(path, cells, runs) for name, path in claim.facts.items()},
        "runs": len(records),
        "seconds": sum(part.get("train", 0.0) + part.get("evaluate", 0.0) for part in seconds),
        "seconds_at_least": reused,
        **({"other_code": sorted(other)} if (other := {task.label for task, cell in used.items() if cell.other_code}) else {}),
        "commits": sorted({str(record.get("commit")) for record in records.values()}),
        "written": max(str(record.get("written")) for record in records.values()),
    }


def _finished(claim: Claim, own: Mapping[Task, Cell]) -> _Runs:
    """The runs of the seeds with which all rows have finished; a row of one seed alone stands beside all seeds."""
    planned: dict[str, list[Cell]] = {label: [] for label in claim.labels}
    for cell in own.values():
        planned[cell.label].append(cell)
    done = {label: {cell.seed: cell for cell in found if cell.status == DONE} for label, found in planned.items()}
    several = [set(found) for label, found in done.items() if len(planned[label]) > 1]
    seeds = set.intersection(*several) if several else {seed for found in done.values() for seed in found}
    if not seeds or not all(done.values()):
        failed = next((f"{cell.label}, seed {cell.seed}: {cell.error}" for cell in own.values() if cell.status == FAILED), None)
        apart = "; ".join(f"{label}: {', '.join(map(str, sorted(found)))}" for label, found in done.items())
        why = f"its rows have no finished seed in common ({apart})" if all(done.values()) else "its runs have no records yet"
        raise NotMeasuredError(failed or why)
    return _Runs(claim, done, tuple(sorted(seeds)))


def _test(runs: _Runs, better: Side, worse: Side) -> dict[str, Any]:
    one, other = runs.side(better), runs.side(worse)
    users = next(len(side) for side in (one, other) if isinstance(side, np.ndarray))
    if users < 2:
        raise NotMeasuredError(f"one user alone has no interval ({better} and {worse})")
    first, second = (np.broadcast_to(side, users) for side in (one, other))
    found = significance.compare(first, second, flips=FLIPS)
    interval, p = significance.interval(first - second), found.p_value
    number = other if isinstance(other, float) else one
    exact = isinstance(number, float) and _are_hits(first if number is other else second)
    if isinstance(other, float):
        interval, p = _against_number(first, other)
    elif isinstance(one, float):
        (low, high), p = _against_number(second, one)
        interval = -high, -low
    elif not (better.is_row and worse.is_row):  # the sign of a difference from a formula is not exchangeable
        p = _t_test(first - second)
    return {
        "better": str(better),
        "worse": str(worse),
        "means": [float(first.mean()), float(second.mean())],
        "difference": found.difference,
        "interval": list(interval),
        "p_value": p,
        "deviation": found.deviation,
        "users": users,
        "differing": None if exact else _differing(first - second),
        "at_chance": better.is_row and worse.is_row and _at_chance(runs.chance(), first, second),
    }


def _at_chance(chance: float | None, *rows: np.ndarray) -> bool:
    """Whether no row [N] is above a random ranking by more than its 95 % interval."""
    return chance is not None and all(significance.interval(row)[0] <= chance for row in rows)


def _differing(differences: np.ndarray) -> int:
    """Number of users whose difference [N] is not the most frequent one, which mostly is 0."""
    _, counts = np.unique(np.round(differences, 12), return_counts=True)
    return len(differences) - int(counts.max())


def _recorded(cells: Mapping[Task, Cell], runs: _Runs, better: Side, worse: Side) -> dict[str, Any]:
    """The comparison of a measurement of the run record with a number; of several seeds, values and ends are averaged."""
    (side, other), sign = ((better, worse), 1) if better.path else ((worse, better), -1)
    number, found = other.number or 0.0, []
    for end in (("value",), ("interval", 0), ("interval", 1)):
        part = _fact((str(side.label), *side.path, *end), cells, runs)
        if not isinstance(part, float):
            raise NotMeasuredError(f"the record of {side.label} has no number at {' '.join(map(str, (*side.path, *end)))}")
        found.append(part)
    value, *ends = found
    return {
        "better": str(better),
        "worse": str(worse),
        "means": [value, number][::sign],
        "difference": sign * (value - number),
        "interval": sorted(sign * (end - number) for end in ends),
        "p_value": None,
        "deviation": None,
        "users": None,
    }


def _against_number(values: np.ndarray, number: float) -> tuple[tuple[float, float], float]:
    """95 % interval and p-value of the mean of values [N] minus a number; exact for hits."""
    if not _are_hits(values):
        return significance.interval(values - number), _t_test(values - number)
    found = stats.binomtest(int(np.sum(values)), len(values), number)
    low, high = found.proportion_ci(0.95)
    return (float(low) - number, float(high) - number), float(found.pvalue)


def _are_hits(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _t_test(differences: np.ndarray) -> float:
    """Two-sided p-value of a mean that is not 0; of equal differences [N], which have no deviation, that of their signs."""
    if np.ptp(differences):
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    return min(1.0, 2.0 ** (1 - len(differences))) if differences[0] else 1.0


def _fact(path: Sequence[Any], cells: Mapping[Task, Cell], runs: _Runs) -> float | str | None:
    """A value of the run records, averaged over seeds; None if they lack it."""
    label, *keys = path
    seeds = runs.used(label) if label in runs.cells else runs.seeds
    found = []
    for task, cell in cells.items():
        if task.label == label and task.protocol == runs.claim.protocol and task.seed in seeds:
            value: Any = task.read() if cell.status == DONE else None
            for key in keys:
                fits = isinstance(value, Mapping) or (isinstance(value, list) and key in range(len(value)))
                value = (value.get(key) if isinstance(value, Mapping) else value[key]) if fits else None
            found.append(value)
    numbers = [value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if found and len(numbers) == len(found):
        return float(np.mean(numbers))
    return next((value for value in found if isinstance(value, str)), None)


def _numbers(part: Any) -> dict[str, float]:
    given = part if isinstance(part, Mapping) else {}
    return {str(key): float(value) for key, value in given.items() if isinstance(value, (int, float))}
