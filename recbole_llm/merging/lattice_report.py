"""Does a quantity find good weights? Its rank correlation with the validation metric over a lattice, and its regret.

Legend: P points, N users, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from recbole_llm.merging.lattice import Lattice, least

LEVEL, RESAMPLES = 0.95, 2000


def lattice_report(lattice: Lattice, criteria: Mapping[str, Tensor], names: Sequence[str], *, seed: int = 2020) -> dict[str, Any]:
    """The points with their means over users, and how each criterion relates to the validation metric.

    Of each criterion (less is better), over the points, with 95 % bootstrap intervals over users:

    - ``rank_correlation``: Spearman's, of its mean with the mean metric; -1 is best; None where one of them is constant;
    - ``regret``: the best mean metric minus that of the point of its least mean. Each sample chooses both points anew. The best
      of several noisy means is too high on average, and so is the regret;
    - ``above_single``: the metric of that point minus that of the better single adapter, both points as chosen by all users.

    Args:
        criteria: ``[P, N]`` by name.
        names: of the adapters.
    """
    values = lattice.values.double().numpy()  # [P, N]
    users = values.shape[1]
    counts = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), RESAMPLES) / users  # [R, N]
    sampled = counts @ values.T  # [R, P]
    single = max(lattice.singles, key=lambda point: float(values[point].mean()))
    points = [
        {"phase": phase, "weights": dict(zip(names, mean.tolist(), strict=True)), "score": float(value.mean())}
        for phase, mean, value in zip(lattice.phases, lattice.means, values, strict=True)
    ]
    for point, spread in zip(points, sampled.T, strict=True):
        point["interval"] = _interval(spread)
    found = {}
    for name, criterion in criteria.items():
        own = criterion.double()
        means, spread = own.mean(1), counts @ own.numpy().T  # [P], [R, P]
        chosen = least(means, lattice.weights)
        for point, mean in zip(points, means.tolist(), strict=True):
            point[name] = mean
        found[name] = {
            "rank_correlation": _estimate(
                rank_correlation(means.numpy()[None], values.mean(1)[None]), rank_correlation(spread, sampled)
            ),
            "regret": _estimate(np.array([values.mean(1).max() - values[chosen].mean()]), regret(spread, sampled)),
            "above_single": _estimate(
                np.array([(values[chosen] - values[single]).mean()]), sampled[:, chosen] - sampled[:, single]
            ),
            "least": chosen,
        }
    best = int(values.mean(1).argmax())
    return {"points": points, "best": best, "better_single": names[lattice.singles.index(single)], "criteria": found}


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation ``[R]`` of the rows of two arrays ``[R, P]``; NaN where a row is constant."""
    ranks = [stats.rankdata(rows, axis=1) for rows in (first, second)]
    one, other = (rows - rows.mean(1, keepdims=True) for rows in ranks)
    norm = np.sqrt((one**2).sum(1) * (other**2).sum(1))  # [R]
    return np.divide((one * other).sum(1), norm, out=np.full(len(norm), np.nan), where=norm > 0)


def regret(criterion: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The largest of values minus the one at the least criterion, ``[R]``, of arrays ``[R, P]``."""
    return values.max(1) - np.take_along_axis(values, criterion.argmin(1)[:, None], 1)[:, 0]


def _estimate(value: np.ndarray, sampled: np.ndarray) -> dict[str, Any]:
    """A value [1] and its interval; None where it is undefined."""
    defined = np.isfinite(value[0])
    return {"value": float(value[0]) if defined else None, "interval": _interval(sampled) if defined else None}


def _interval(sampled: np.ndarray) -> list[float] | None:
    """Percentiles of the samples that are defined; None if these are fewer than half."""
    defined = sampled[np.isfinite(sampled)]
    if 2 * len(defined) < len(sampled):
        return None
    return [float(bound) for bound in np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
