"""What the keys of the evaluation mean together: ``eval_args``, ``metrics``, ``topk`` and ``valid_metric``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recbole.evaluator import metric_types, smaller_metrics
from recbole.utils import EvaluatorType

Source = Callable[[str], str]
"""key -> `` in FILE``, the source that gives it; empty for a default."""


def settle_mode(final: dict[str, Any], source: Source) -> None:
    """Replace the mode ``candidates``, which RecBole does not know, by ``full``: one row per user.

    Args:
        final: the values of a run, which are changed; ``candidate_phases`` is added.

    Raises:
        ValueError: not one strategy of splitting, or one that candidates do not have.
    """
    arguments, where = final["eval_args"], source("eval_args")
    mode, split, order = arguments["mode"], arguments["split"], arguments.get("order")
    given = mode or {"valid": "candidates"} if isinstance(mode, dict) else {"valid": mode}
    modes = {phase: given.get(phase) or next(iter(given.values())) for phase in ("valid", "test")}
    final["candidate_phases"] = [phase for phase, value in modes.items() if value == "candidates"]
    modes = {phase: "full" if value == "candidates" else value for phase, value in modes.items()}
    final["eval_args"] = {**arguments, "mode": modes}
    if len(split) != 1:
        raise ValueError(f"eval_args: split: {split}{where} must have one of the keys LS, RS and TS")
    for key, shares in split.items():
        if key != "LS" and (len(shares) != 3 or not shares[0]):
            raise ValueError(
                f"eval_args: split: {split}{where} must have three shares, of training, validation and test, as [0.8, 0.1, 0.1]"
            )
    if final["candidate_phases"] and (split != {"LS": "valid_and_test"} or order != "TO"):
        raise ValueError(
            "eval_args: mode 'candidates' needs split {'LS': 'valid_and_test'} and order 'TO' (the target is the last item "
            f"of each user), not {split} and {order!r}{where}; for another split set eval_args: {{'mode': 'full'}}"
        )


def settle_metrics(final: dict[str, Any], source: Source) -> None:
    """Make lists of ``metrics`` and ``topk``.

    Args:
        final: the values of a run, which are changed.

    Raises:
        ValueError: metrics that are unknown, of two kinds or that the mode does not have, or a ``valid_metric`` of another name.
    """
    metrics, topk, given = final["metrics"], final["topk"], final["valid_metric"]
    final["metrics"] = metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    final["topk"] = topk = [topk] if isinstance(topk, int) else list(topk)
    for key, values in (("metrics", metrics), ("topk", topk)):
        if not values:
            raise ValueError(f"{key}: {values}{source(key)} is empty; give one at least")
    known: list[str] = []
    kinds: dict[Any, str] = {}
    for metric in metrics:
        kind = metric_types.get(metric.lower())
        if kind is None:
            raise ValueError(f"metrics: unknown metric {metric!r}{source('metrics')}; known: {', '.join(sorted(metric_types))}")
        kinds[kind] = metric
        takes_k = kind == EvaluatorType.RANKING and metric.lower() != "gauc"
        known += [f"{metric}@{k}" for k in topk] if takes_k else [metric]
    if len(kinds) > 1:
        ranking, value = kinds[EvaluatorType.RANKING], kinds[EvaluatorType.VALUE]
        raise ValueError(f"metrics: {ranking} measures rankings, {value} click labels{source('metrics')}; remove one of them")
    if EvaluatorType.VALUE in kinds and "full" in final["eval_args"]["mode"].values():
        raise ValueError(
            f"metrics: {metrics[0]}{source('metrics')} measures click labels, which a ranking of candidates or of all items does "
            "not have; give eval_args: {'mode': 'labeled'} for data with labels, or {'mode': 'uni99'}"
        )
    if given.lower() not in map(str.lower, known):
        raise ValueError(
            f"valid_metric: {given} is not computed{source('valid_metric')}; metrics are {metrics}, topk is {topk}; "
            f"give one of {', '.join(known)}"
        )
    bigger = given.split("@")[0].lower() not in smaller_metrics
    if source("valid_metric_bigger") and final["valid_metric_bigger"] != bigger:
        raise ValueError(
            f"valid_metric_bigger: {final['valid_metric_bigger']}{source('valid_metric_bigger')} contradicts {given}, of which "
            f"the {'larger' if bigger else 'smaller'} value is the better one; remove it"
        )
