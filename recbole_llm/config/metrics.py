"""The settings ``metrics``, ``topk`` and ``valid_metric``."""

from __future__ import annotations

from typing import Any

from recbole.evaluator.register import metric_information, metric_types
from recbole.utils import EvaluatorType

from recbole_llm.data import forms


def settle_metrics(final: dict[str, Any]) -> None:
    """Turn single values into lists and check them.

    Raises:
        ValueError: an unknown metric, a ``topk`` that is none, a ``valid_metric`` that is not computed, or a metric that has no
            meaning in the run's mode.
    """
    metrics, topk, given = final["metrics"], final["topk"], str(final["valid_metric"])
    final["metrics"] = metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    final["topk"] = topk = [topk] if isinstance(topk, int) else list(topk)
    if not topk or not all(type(k) is int and k > 0 for k in topk):
        raise ValueError(f"topk: {topk} are not all whole numbers of at least 1; give a list such as [1, 5, 10]")
    known: list[str] = []
    for metric in metrics:
        kind = metric_types.get(str(metric).lower())
        if kind is None:
            raise ValueError(f"metrics: unknown metric {metric!r}; known: {', '.join(sorted(metric_types))}")
        takes_k = kind == EvaluatorType.RANKING and metric.lower() != "gauc"
        known += [f"{metric}@{k}" for k in topk] if takes_k else [metric]
    if given.lower() not in map(str.lower, known):
        raise ValueError(
            f"valid_metric: {given} is not computed; metrics are {metrics}, topk is {topk}; give one of {', '.join(known)}"
        )
    forms.check_metrics(final)
    _check_lists(metrics, given, final)


def describes_lists(metric: str) -> bool:
    """Whether a metric describes the recommended items themselves and not where targets rank; ``metric`` may have a cutoff."""
    return "rec.items" in metric_information[metric.lower().partition("@")[0]]


def _check_lists(metrics: list[str], valid_metric: str, final: dict[str, Any]) -> None:
    """Refuse metrics of lists among drawn candidates, where their value is a property of the draw.

    At validation they are left out instead, since an LLM ranker is validated on candidates before a full ranking.
    """
    lists = list(filter(describes_lists, metrics))
    drawn = [phase for phase in ("valid", "test") if phase not in final["full_phases"]]
    if lists and ("test" in drawn or (drawn and describes_lists(valid_metric))):
        raise ValueError(
            f"metrics: {', '.join(lists)} describe recommendations from the whole catalogue, and {' and '.join(drawn)} rank "
            "drawn candidates. Remove them from metrics and valid_metric, or give eval_args: {'mode': 'full'} (for an LLM ranker "
            "{'mode': {'valid': 'candidates', 'test': 'full'}})"
        )
