"""Can the gain of a merge be forecast from its adapters alone? One test and one figure over the records of many runs.

The features are those of :mod:`recbole_llm.leaderboard.merges`. Spearman's rank correlation of each with the gain is tested by
permuting the merges. Merges that share adapters or data are not independent, so the p-values are rather too low.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from recbole_llm.evaluation import significance
from recbole_llm.evaluation.plots import picture
from recbole_llm.leaderboard.digits import p_value
from recbole_llm.leaderboard.merges import FEATURES, OWN, UNIFORM, Gain, Merge, read_merges
from recbole_llm.store.files import atomic_write

FEWEST = 4  # points; with fewer, no order is rare
RESAMPLES = 9_999
LEVEL = 0.05
_MARKS = {OWN: ("o", "#1f5fae"), UNIFORM: ("s", "#8a5a12")}


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of a feature with a gain over ``points`` merges; ``p`` and ``rho`` are None with too few.

    Attributes:
        adjusted: p after Benjamini-Hochberg over all tests.
    """

    feature: str
    mixture: str
    points: int
    rho: float | None = None
    p: float | None = None
    adjusted: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What the records say; ``passed_over`` has each record that is no point, and why."""

    metric: str
    merges: list[Merge]
    correlations: list[Correlation]
    passed_over: dict[str, str]

    @property
    def verdict(self) -> str:
        """One sentence."""
        tested = [(found.adjusted, found) for found in self.correlations if found.adjusted is not None]
        if not tested:
            merges = f"{len(self.merges)} {'merge' if len(self.merges) == 1 else 'merges'}"
            return f"not decidable: {merges}, and a test needs {FEWEST} with different features and gains"
        p, best = min(tested, key=lambda pair: pair[0])
        what = f"{best.feature} with the gain of {best.mixture}: rho {best.rho:+.2f}, adjusted p {p_value(p)}, n = {best.points}"
        return f"{'yes' if p < LEVEL else 'no'}: the nearest is {what}"

    def __str__(self) -> str:
        """The merges, the tests and the verdict."""
        gains = (OWN, UNIFORM)
        heads = ["merge", "seeds", "users", "better adapter", *(f"{self.metric}: gain of {name}" for name in gains)]
        rows = [[m.name, len(m.seeds), m.users, m.better, *(_text(m.gains.get(name)) for name in gains)] for m in self.merges]
        tests = [[c.feature, c.mixture, c.points, _signed(c.rho), *map(_p, (c.p, c.adjusted))] for c in self.correlations]
        left_out = [f"left out: {path}: {why}" for path, why in self.passed_over.items()]
        tables = [
            tabulate(rows, headers=heads, disable_numparse=True),
            tabulate(tests, headers=["feature", "gain of", "n", "rho", "p", "adjusted"], disable_numparse=True),
        ]
        return "\n".join(["\n\n".join(tables), "", *left_out, f"forecast: {self.verdict}"])


def write_forecast(given: Sequence[str | Path], out: Path, *, metric: str | None = None) -> tuple[Forecast, list[Path]]:
    """Make the forecast of the runs, and write ``forecast.json`` and ``forecast.png`` into ``out``; also returns the files."""
    found = forecast(given, metric=metric)
    out.mkdir(parents=True, exist_ok=True)
    content = {**asdict(found), "verdict": found.verdict}
    files = [out / "forecast.json", out / "forecast.png"]
    atomic_write(files[0], json.dumps(content, indent=1))
    _draw(files[1], found)
    return found, files


def forecast(given: Sequence[str | Path], *, metric: str | None = None) -> Forecast:
    """The merges of runs, and the correlation of each feature with each gain; arguments and errors as :func:`read_merges`."""
    merges, chosen, passed_over = read_merges(given, metric)
    return Forecast(chosen, merges, _correlations(merges), passed_over)


def _points(merges: Sequence[Merge], feature: str, mixture: str) -> list[tuple[float, Gain]]:
    """Feature and gain of the merges that have both; the even mixture of the same adapters is one point in all of them."""
    found: dict[tuple[str, ...], tuple[float, Gain]] = {}
    for place, merge in enumerate(merges):
        x, gain = merge.features[feature], merge.gains.get(mixture)
        if x is not None and gain is not None:
            found.setdefault(tuple(merge.adapters) if mixture == UNIFORM else (str(place),), (x, gain))
    return list(found.values())


def _correlations(merges: Sequence[Merge]) -> list[Correlation]:
    found = []
    for feature in FEATURES:
        for mixture in (OWN, UNIFORM):
            points = _points(merges, feature, mixture)
            rho, p = spearman([x for x, _ in points], [gain.value for _, gain in points])
            found.append(Correlation(feature, mixture, len(points), rho, p))
    adjusted = iter(significance.adjusted([one.p for one in found if one.p is not None]).tolist())
    return [one if one.p is None else replace(one, adjusted=next(adjusted)) for one in found]


def spearman(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Rank correlation of values [N] and [N], and its two-sided p-value by permutations, all of them if they are few.

    None and None with fewer than :data:`FEWEST` values, or if one side is constant.
    """
    if len(first) < FEWEST or len({*first}) == 1 or len({*second}) == 1:
        return None, None
    one, other = (stats.zscore(stats.rankdata(values)) for values in (first, second))  # [N]

    def statistic(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean(drawn * other, axis=axis)

    drawn = stats.permutation_test(
        (one,), statistic, permutation_type="pairings", vectorized=True, n_resamples=RESAMPLES, random_state=2020
    )
    return float(drawn.statistic), float(drawn.pvalue)


def _draw(file: Path, found: Forecast) -> None:
    """Write a picture (PNG) with one panel for each feature: the gain of each merge with its interval."""
    with picture(file, (2.9 * len(FEATURES) + 0.6, 3.6)) as figure:
        columns = figure.subplots(1, len(FEATURES), sharey=True, squeeze=False)[0]
        for axes, feature in zip(columns, FEATURES, strict=True):
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            for name, (mark, colour) in _MARKS.items():
                rows = [(x, gain.value, gain.low, gain.high) for x, gain in _points(found.merges, feature, name)]
                x, y, low, high = np.array(rows).reshape(-1, 4).T  # [P] each
                axes.errorbar(x, y, [y - low, high - y], fmt=mark, color=colour, ms=5, elinewidth=1, alpha=0.8, label=name)
            axes.set_title("\n".join(_note(c) for c in found.correlations if c.feature == feature), fontsize=8)
            axes.set_xlabel(feature)
        columns[0].set_ylabel(f"gain in {found.metric} over the better adapter")
        figure.legend(*columns[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_MARKS), frameon=False)


def _note(found: Correlation) -> str:
    """The test as a line of the figure."""
    if found.rho is None or found.p is None:
        return f"{found.mixture}: not tested, n = {found.points}"
    return f"{found.mixture}: rho {found.rho:+.2f}, p {p_value(found.p)}, n = {found.points}"


def _text(gain: Gain | None) -> str:
    return "-" if gain is None else f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else p_value(value)
