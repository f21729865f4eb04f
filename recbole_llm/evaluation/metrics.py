"""Metrics from the ranks of single targets, equal to RecBole's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

FROM_RANKS = ("hit", "recall", "ndcg", "mrr")


def check_valid_metric(name: str) -> None:
    """Raise a ValueError if a ``valid_metric`` does not follow from the rank of a target."""
    if name.lower().partition("@")[0] not in FROM_RANKS:
        raise ValueError(f"valid_metric: {name} does not follow from a target's rank; choose Hit, Recall, NDCG or MRR")


def metrics(ranks: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    """Hit, Recall, NDCG and MRR from the ranks [N] of single targets, by name; a missed target has an infinite rank.

    ``names`` are those of RecBole's results, such as ``ndcg@10``; ``mrr`` has no cutoff. Other metrics are ignored.
    """
    return {name: float(values.mean()) for name, values in by_user(ranks, names).items()}


def half_widths(ranks: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    """The :func:`half_width` over users of each of :func:`metrics`.

    If all users have the same value, as where every target is missed, it is 3 / N, by the rule of three (Hanley and
    Lippman-Hand, JAMA 1983): a share of other users above that would have shown itself in 95 % of such samples.
    """
    return {name: half_width(values) or min(1.0, 3 / len(values)) for name, values in by_user(ranks, names).items()}


def half_width(values: np.ndarray) -> float:
    """Half width of the 95 % confidence interval of the mean of values [N] (normal approximation)."""
    return float(1.96 * values.std() / np.sqrt(len(values)))


def by_user(ranks: Sequence[float], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The metrics of each user, FloatArray[N] by name; empty without ranks."""
    places = np.asarray(ranks, dtype=np.float64)  # [N]
    found = np.ones_like(places)  # [N]; of one target, recall is hit
    gains = {"hit": found, "recall": found, "ndcg": 1 / np.log2(1 + places), "mrr": 1 / places}
    values = {}
    for name in names if len(places) else ():
        metric, _, k = name.partition("@")
        if metric in gains:
            values[name] = gains[metric] * (places <= float(k or "inf"))
    return values
