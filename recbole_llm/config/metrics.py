"""Metrics of the recommended items themselves, which are meaningful only for rankings of the whole catalogue."""

from __future__ import annotations

from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import metric_information
from recbole.utils import EvaluatorType


def with_cutoff(metric: str, k: int) -> str:
    """The name of a known metric in results, ``NDCG@10``; ``GAUC`` and metrics of click labels have no cutoff."""
    has_one = metric_types[metric.lower()] == EvaluatorType.RANKING and metric.lower() != "gauc"
    return f"{metric}@{k}" if has_one else metric


def describes_lists(metric: str) -> bool:
    """Whether a metric describes the recommended items themselves and not where targets rank; ``metric`` may have a cutoff."""
    return "rec.items" in metric_information[metric.lower().partition("@")[0]]


def check_lists(metrics: list[str], valid_metric: str, final: dict[str, Any]) -> None:
    """Refuse metrics of lists among drawn candidates, where their value is a property of the draw.

    At validation they are left out instead, since an LLM ranker is validated on candidates before a full ranking.

    Raises:
        ValueError: names the metrics and the mode.
    """
    lists = list(filter(describes_lists, metrics))
    drawn = [phase for phase in ("valid", "test") if phase not in final["full_phases"]]
    if lists and ("test" in drawn or (drawn and describes_lists(valid_metric))):
        raise ValueError(
            f"metrics: {', '.join(lists)} describe recommendations from the whole catalogue, and {' and '.join(drawn)} rank "
            "drawn candidates. Remove them from metrics and valid_metric, or give eval_args: {'mode': 'full'} (for an LLM ranker "
            "{'mode': {'valid': 'candidates', 'test': 'full'}})"
        )
