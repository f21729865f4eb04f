"""Checks whether the keys of the evaluation fit together: ``eval_args``, ``metrics``, ``topk`` and ``valid_metric``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recbole.evaluator import metric_types, smaller_metrics
from recbole.utils import EvaluatorType

from recbole_llm.config.metrics import check_lists, describes_lists, with_cutoff
from recbole_llm.data import forms

Source = Callable[[str], str]
"""key -> `` in FILE``, the source that gives it; empty for a default."""


def settle_mode(
    final: dict[str, Any], given: Mapping[str, Any], beside: Mapping[str, Any], *, model: str, lists_only: bool
) -> None:
    """Check the form of the data; replace the mode ``candidates``, unknown to RecBole, by ``full``: one row per user.

    Args:
        final: the values of a run, which are changed; ``candidate_phases`` and ``full_phases`` are added, the phases of a mode.
        given: the user's values.
        beside: those of the file beside the data.
        model, lists_only: as in :func:`~recbole_llm.data.forms.check`, which may raise.
    """
    final["eval_args"] = forms.complete(final["eval_args"])
    modes = final["eval_args"]["mode"]
    forms.check(final, {**beside, **given}, model=model, lists_only=lists_only)
    if final["benchmark_filename"]:
        final.update(dict.fromkeys(forms.FILTERS))  # RecBole's defaults, and those of a published data set of this name
    final["candidate_phases"] = forms.phases(final, [phase for phase, value in modes.items() if value == "candidates"])
    final["full_phases"] = [phase for phase, value in modes.items() if value == "full"]
    final["eval_args"]["mode"] = {phase: "full" if value == "candidates" else value for phase, value in modes.items()}
    if "load_col" not in given:
        final["load_col"] = forms.load_col(final)


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
            hint = "; numbers stand in topk" if "@" in metric else ""
            known_names = ", ".join(sorted(metric_types))
            raise ValueError(f"metrics: unknown metric {metric!r}{source('metrics')}{hint}; known: {known_names}")
        kinds[kind] = metric
        known += dict.fromkeys(with_cutoff(metric, k) for k in topk)
    if len(kinds) > 1:
        ranking, value = kinds[EvaluatorType.RANKING], kinds[EvaluatorType.VALUE]
        raise ValueError(f"metrics: {ranking} measures rankings, {value} click labels{source('metrics')}; remove one of them")
    modes = final["eval_args"]["mode"].values()
    if EvaluatorType.RANKING in kinds and "labeled" in modes:
        raise ValueError(
            f"metrics: {metrics[0]}{source('metrics')} measures rankings, which mode 'labeled' does not have; give eval_args: "
            "{'mode': 'full'}, or metrics of click labels such as ['AUC', 'LogLoss']"
        )
    if EvaluatorType.VALUE in kinds and "full" in modes:
        raise ValueError(
            f"metrics: {metrics[0]}{source('metrics')} measures click labels, which a ranking of candidates or of all items does "
            "not have; give eval_args: {'mode': 'labeled'} for data with labels, or {'mode': 'uni99'}"
        )
    if given.lower() not in map(str.lower, known):
        of_targets = [name for name in known if not describes_lists(name)]  # others are refused below, but for full rankings
        raise ValueError(
            f"valid_metric: {given} is not computed{source('valid_metric')}; metrics are {metrics}, topk is {topk}; "
            f"give one of {', '.join(of_targets or known)}"
        )
    check_lists(metrics, given, final)
    bigger = given.split("@")[0].lower() not in smaller_metrics
    if source("valid_metric_bigger") and final["valid_metric_bigger"] != bigger:
        raise ValueError(
            f"valid_metric_bigger: {final['valid_metric_bigger']}{source('valid_metric_bigger')} contradicts {given}, of which "
            f"the {'larger' if bigger else 'smaller'} value is the better one; remove it"
        )
