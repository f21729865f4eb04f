"""The plan of a run: what each stage and the evaluation cost, in which order, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from typing import Any, TypeVar

from tabulate import tabulate

from recbole_llm.costs.devices import GIB, Speed
from recbole_llm.store.costs import Cost, Measured, Tokens
from recbole_llm.store.stages import Stage, StageCache, in_order

logger = getLogger()

CACHED, TO_RUN = "cached", "to run"
C = TypeVar("C")
_FAILURES = (AttributeError, TypeError, RuntimeError, KeyError, IndexError, NotImplementedError)
_REMEDIES = {
    "weights": "load_in_4bit: True (CUDA), a smaller dtype, or a smaller LM",
    "activations": "gradient_checkpointing: True, or a lower train_batch_tokens or max_history",
    "logits": "a lower train_batch_tokens (training) or score_batch_tokens (scoring)",
    "KV cache": "a lower score_batch_tokens, max_history or num_negatives",
    "hidden states": "a lower score_batch_tokens",
    "trained weights": "a lower r, or fewer target_modules",
    "item matrix": "fewer items (filters of the dataset)",
}


@dataclass(frozen=True)
class Line:
    """One stage, or a part of the evaluation, with its cost; None if it is cached."""

    name: str
    status: str
    cost: Cost | None


@dataclass(frozen=True)
class Plan:
    """The lines of a run in order; ``speed`` is None if the run is too short for its measurement."""

    heading: str
    lines: Sequence[Line]
    speed: Speed | None = None

    @property
    def flops(self) -> float:
        """All estimated floating-point operations."""
        return sum(line.cost.flops or 0 for line in self.lines if line.cost)

    @property
    def work(self) -> dict[str, int]:
        """:attr:`Cost.work` of the lines, by name."""
        return {line.name: line.cost.work for line in self.lines if line.cost}

    def seconds(self, cost: Cost) -> float | None:
        """Predicted duration; None if the operations or the speed are not known."""
        if self.speed is None or cost.flops is None:
            return cost.seconds
        return self.speed.seconds(cost) + (cost.seconds or 0)

    def __str__(self) -> str:
        headers = ["", "", "samples", "steps", "trained tokens", "(padded)", "read tokens", "(padded)"]
        headers += ["parameters", "memory", "TFLOP", "time"]
        rows = [self._row(line) for line in self.lines]
        total = [line.cost for line in self.lines if line.cost]
        mark = max((_mark(cost) for cost in total if cost.tokens.fed), default="")
        times = [seconds for cost in total if (seconds := self.seconds(cost)) is not None]
        rows.append(
            ["total", "", "", ""]
            + [*_tokens(_sum(cost.trained for cost in total), mark), *_tokens(_sum(cost.read for cost in total), mark)]
            + [
                "",
                _bytes(max((cost.peak for cost in total), default=0)),
                _tera(self.flops),
                _limit(*total) + _time(sum(times)) if times else "",
            ]
        )
        return "\n".join([f"plan: {self.heading}", _table(headers, rows, left=2), *self._explained()])

    def _row(self, line: Line) -> list[str]:
        cost = line.cost
        if cost is None:
            return [line.name, line.status, *[""] * 10]
        return [
            line.name,
            line.status,
            *(_count(number) for number in (cost.samples, cost.steps)),
            *_tokens(cost.trained, _mark(cost)),
            *_tokens(cost.read, _mark(cost)),
            _count(cost.parameters),
            _bytes(cost.peak),
            _tera(cost.flops),
            "" if (seconds := self.seconds(cost)) is None else _limit(cost) + _time(seconds),
        ]

    def _explained(self) -> list[str]:
        lines = [f"  {line.name}: {line.cost.note}" for line in self.lines if line.cost and line.cost.note]
        costs = {line.name: line.cost for line in self.lines if line.cost and line.cost.memory}
        if not costs:
            return lines
        name, largest = max(costs.items(), key=lambda pair: pair[1].peak)
        parts = ", ".join(f"{part} {_bytes(size)}" for part, size in largest.memory.items())
        lines.append(f"  memory, largest in {name}: {parts}")
        if self.speed is not None:
            lines.append(f"  time: {self.speed.source}")
            lines += [_misfit(name, cost, self.speed.memory) for name, cost in costs.items() if _too_large(cost, self.speed)]
        return lines

    def as_dict(self, measured: Mapping[str, Measured | None]) -> list[dict[str, Any]]:
        """The lines with what was measured, for the run record."""
        lines = []
        for line in self.lines:
            found = measured.get(line.name)
            cost = line.cost and {**asdict(line.cost), "seconds": self.seconds(line.cost), "bytes": line.cost.peak}
            lines.append({"name": line.name, "status": line.status, "planned": cost, "measured": found and asdict(found)})
        return lines

    def compared(self, measured: Mapping[str, Measured | None]) -> str:
        """Planned and measured tokens, seconds and memory of the lines that ran, as a table."""
        rows = []
        for line in self.lines:
            cost, found = line.cost, measured.get(line.name)
            if cost is None or found is None:
                continue
            seconds, cached = self.seconds(cost), cost.tokens.fed and not (found.trained + found.read).fed
            rows.append(
                [
                    f"{line.name}, cached" if cached else line.name,
                    *(_count(tokens.fed) for tokens in (cost.trained, found.trained, cost.read, found.read)),
                    "" if seconds is None else _limit(cost) + _time(seconds),
                    _time(found.seconds),
                    _bytes(cost.peak),
                    _bytes(found.peak),
                ]
            )
        headers = ["", "trained tokens: planned", "measured", "read tokens: planned", "measured"]
        headers += ["time: planned", "measured", "memory: planned", "measured peak"]
        return _table(headers, rows, left=1) if rows else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """The columns of which some cell says something, the first ``left`` ones of all aligned to the left."""
    kept = [0, *(place for place in range(1, len(headers)) if any(row[place] not in ("", "0", "0.0") for row in rows))]
    cells = [[row[place] for place in kept] for row in rows]
    align = ["left" if place < left else "right" for place in kept]
    return tabulate(cells, headers=[headers[place] for place in kept], disable_numparse=True, colalign=align)


def stage_lines(stages: Sequence[Stage], cache: StageCache, *, unknown: str = "") -> list[Line]:
    """The stages and all their inputs, in the order in which they run.

    Args:
        unknown: why the costs cannot be known yet, if so.
    """
    lines: list[Line] = []
    for stage in in_order(stages):
        name = stage.second_name if any(line.name == stage.name for line in lines) else stage.name
        if cache.is_cached(stage):
            lines.append(Line(name, CACHED, None))
            continue
        cost = None if unknown else stage.cost
        own = Cost(note=f"not estimated{unknown and ': '}{unknown}") if cost is None else estimated(cost)
        lines.append(Line(name, TO_RUN, own))
    return lines


def estimated(cost: Callable[[], C]) -> C | Cost:
    """The result of ``cost()``; if a model does something that a blank LM cannot follow, a cost without figures."""
    try:
        return cost()
    except _FAILURES as error:
        logger.debug("plan", exc_info=True)
        return Cost(note=f"not estimated ({type(error).__name__}: {error})")


def _misfit(name: str, cost: Cost, memory: int | None) -> str:
    """Which parts are large, and the keys that make them smaller."""
    large = sorted((part for part, size in cost.memory.items() if size >= cost.peak / 10), key=lambda part: -cost.memory[part])
    told = (f"{part} ({_bytes(cost.memory[part])}): {_REMEDIES.get(part, 'a smaller LM')}" for part in large)
    return f"  {name} does not fit, {_bytes(cost.peak)} of {_bytes(memory or 0)}; " + "; ".join(told)


def _too_large(cost: Cost, speed: Speed) -> bool:
    return speed.memory is not None and cost.peak > speed.memory


def _sum(tokens: Iterable[Tokens]) -> Tokens:
    return sum(tokens, Tokens())


def _mark(cost: Cost) -> str:
    """What stands before a number of tokens: nothing if it is exact, ~ if it is extrapolated, ≤ if it is an upper bound."""
    return "≤" if cost.at_most else "" if cost.exact else "~"


def _limit(*costs: Cost) -> str:
    """What stands before a time that is an upper bound."""
    return "≤" if any(cost.at_most for cost in costs) else ""


def _tokens(tokens: Tokens, mark: str) -> list[str]:
    return [f"{mark}{_count(tokens.real)}", f"{mark}{_count(tokens.fed)}"] if tokens.fed else ["", ""]


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _bytes(size: int) -> str:
    if not size:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _tera(flops: float | None) -> str:
    return "" if not flops else f"{flops / 1e12:,.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
