"""The values of a metric for each user, from the ranks of a run record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.published import PREFIX, in_recbole
from recbole_llm.leaderboard import comparable

_TOLERANCE = 1e-3  # between a recorded metric and the mean over its ranks, besides the rounding of the former


@dataclass(frozen=True)
class PerUser:
    """Values [N] of a metric and the users [N], sorted."""

    users: tuple[str, ...]
    values: np.ndarray


def per_user(record: Mapping[str, Any], row: str, metric: str, slice_name: str | None = None) -> PerUser | None:
    """The values of a row of a run record; None without ranks, or with ranks that do not agree with the recorded metric.

    Args:
        metric: as in a record, such as ``ndcg@10``; one that begins with ``published_`` is of the generated answers.
        slice_name: only the users of this slice.
    """
    published = metric.startswith(PREFIX)
    part: Any = (((record.get("published") or {}).get("rows") or {}).get(row) or {}) if published else record
    ranks = part.get("ranks") if published else (part.get("ranks") or {}).get(row)
    recorded = ((part.get("results") or {}) if published else (part.get("results") or {}).get(row) or {}).get(metric)
    if not isinstance(ranks, Mapping) or not ranks or not isinstance(recorded, (int, float)):
        return None
    users = sorted(map(str, ranks))
    places = np.array([np.inf if ranks[user] is None else ranks[user] for user in users], dtype=np.float64)
    name = in_recbole(metric)
    distinct, where = np.unique(places, return_inverse=True)
    gains = [metrics.metrics([rank], [name]).get(name) for rank in distinct.tolist()]  # a mean over one user
    if None in gains:
        return None
    values = np.array(gains, dtype=np.float64)[where]
    if not abs(values.mean() - recorded) <= _tolerance(record):
        return None
    found = PerUser(tuple(users), values)
    return found if slice_name is None else _within(found, record, row, metric, slice_name)


def _within(found: PerUser, record: Mapping[str, Any], row: str, metric: str, name: str) -> PerUser | None:
    own = set((record.get("slice_users") or {}).get(name) or ())
    kept = np.array([user in own for user in found.users])
    if not kept.any():
        return None
    part = PerUser(tuple(user for user in found.users if user in own), found.values[kept])
    recorded = (((record.get("slices") or {}).get(row) or {}).get(name) or {}).get(metric)
    agrees = recorded is None or abs(part.values.mean() - recorded) <= _tolerance(record)
    return part if agrees else None


def _tolerance(record: Mapping[str, Any]) -> float:
    decimals = (record.get("config") or {}).get("metric_decimal_place")
    return max(_TOLERANCE, 0.5 * 10.0**-decimals + 1e-9) if isinstance(decimals, int) else _TOLERANCE


def mean_over_seeds(what: str, found: Mapping[int, PerUser | None]) -> PerUser | None:
    """The values of each user averaged over seeds; None without any, or if those of a seed are missing.

    Raises:
        ValueError: the seeds have different users; names ``what``.
    """
    own = {seed: values for seed, values in found.items() if values is not None}
    if not own or len(own) < len(found):
        return None
    comparable.same_users(f"leaderboard: {what}", {f"seed {seed}": values.users for seed, values in own.items()})
    return PerUser(next(iter(own.values())).users, np.mean([values.values for values in own.values()], axis=0))
