"""A finished run evaluated again, with other metrics or on other items: the weights are those of its record, nothing is trained.

The record has the time of the training and the code and files that it was made of, as the run's own. Its folder is not that of a
run with the same settings, which could train other weights (``eval_users`` also chooses the users of early stopping).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.evaluator import metric_types

from recbole_llm import compat, quick_start, registry
from recbole_llm.config import checks
from recbole_llm.config.metrics import describes_lists, with_cutoff
from recbole_llm.config.property_files import PropertyFiles
from recbole_llm.config.recorded import given_mode
from recbole_llm.evaluation import generated, predictions
from recbole_llm.evaluation.record import RunRecord, table
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.store import runs

logger = getLogger()

KEYS = frozenset(
    {
        *("metrics", "topk", "metric_decimal_place", "eval_args", "candidates", "eval_users", "slices", "mask_history"),
        *("save_predictions", "predictions_topk", "retriever", "retriever_config", "retriever_top"),
        *("scoring", "published_max_new_tokens", "scorer", "normalize", "shuffled_title_control"),
        *("eval_batch_size", "score_batch_tokens", "show_progress", "use_gpu", "gpu_id", "note"),
    }
)
"""The keys that may be given: of the evaluation, and of how it is computed."""


def evaluate_run(given: str | Path, keys: Mapping[str, Any], data_path: str | None = None, model: str | None = None) -> Path:
    """Evaluate a run by the settings of its record and ``keys``; returns the path of the new record.

    Args:
        given, data_path, model: as of :meth:`PastRun.load`.
        keys: settings of :data:`KEYS`; of ``eval_args``, the ``mode`` of the test alone.

    Raises:
        ValueError: a key that would change the training or changes nothing, or as :meth:`PastRun.load`.
    """
    path = runs.record_file(given, "--run")
    record = read_record(path)
    _check(keys, record)
    changes = {**keys, **_valid_metric(keys, record)}
    if "eval_args" in keys:
        changes["eval_args"] = _eval_args(keys["eval_args"], record)
    run, began = PastRun.load(given, data_path, model, retriever=False, changes=changes).parts, time.monotonic()
    config, trainer = run.config, run.trainer
    for key, what in quick_start.idle(run, keys, ["test"]).items():
        value = f"{key}: {keys[key]!r}"
        raise ValueError(f"{value} changes nothing in this evaluation of {config['model']}; it is for {what}; remove it")
    config.evaluate(record["fingerprint"])
    predictions.check(config, run.test)
    found = RunRecord(config, trainer, run.valid, run.test)
    quick_start.evaluate_variants(run, found, saved=False, main=True)
    ranks = {row.name: row.ranks for row in found.rows}
    published = generated.evaluate(config, trainer.recommender, run.candidates.get("test"), ranks)
    own = ("best_valid_result", "best_valid_users", "code", "inputs", "passport", "histories_sha256", "checkpoint", "processes")
    written = found.write(
        **{key: record[key] for key in own if key in record},
        seconds={**record.get("seconds", {}), "evaluate": time.monotonic() - began},
        peak_memory_bytes=compat.peak_memory_bytes(),
        published=published and published.content(found.user_ids),
        evaluates=path.parent.name,
        **trainer.recommender.findings(found.rows),
    )
    logger.info(f"{found.heading}\n{table(found.rows)}\nrun record: {written}")
    if published:
        logger.info(published.table())
    return written


def _check(keys: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    files, defaults = PropertyFiles(), dict.fromkeys(KEYS)
    for key, value in keys.items():
        if key not in KEYS:
            if key not in record["config"]:  # which has the keys of a model of the user, too
                checks.check({key: value}, "evaluate", files, defaults)
            names = f"--model={record['model']} --dataset={record['dataset']}"
            raise ValueError(
                f"{key} is not a setting of the evaluation, and the weights of a finished run are not changed; give it to a new "
                f"run ({names}), or give one of: {', '.join(sorted(KEYS))}"
            )


def _valid_metric(keys: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """One of other metrics, if that of the run's validation, which is over, is not among them; RecBole needs one.

    Raises:
        ValueError: all of them describe lists.
    """
    registry.add_metrics()

    def listed(key: str) -> list[Any]:
        value = keys.get(key, record["config"][key])
        return [*value] if isinstance(value, list | tuple) else [value]

    names, lengths = listed("metrics"), listed("topk")
    if not all(str(name).lower() in metric_types for name in names) or not lengths:
        return {}  # which the configuration refuses
    usual, _, length = str(record["config"]["valid_metric"]).partition("@")
    if not names or (usual.lower() in map(str.lower, names) and (not length or int(length) in lengths)):
        return {}
    fitting = [name for name in names if not describes_lists(name)]
    if not fitting:
        raise ValueError(
            f"metrics: {', '.join(names)} describe the recommended items, and RecBole also needs a metric of their ranks; "
            f'give --metrics="{[usual, *names]}"'
        )
    return {"valid_metric": with_cutoff(fitting[0], lengths[0])}


def _eval_args(given: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The ``eval_args`` of the run with another ``mode`` of the test; that of validation chose its weights."""
    mode = given.get("mode") if isinstance(given, Mapping) and {*given} == {"mode"} else None
    if isinstance(mode, Mapping) and {*mode} == {"test"}:
        mode = mode["test"]
    if not isinstance(mode, str):
        raise ValueError(
            f"eval_args: {given!r} would change the split or the validation of a finished run; give the mode of the test alone, "
            "--eval_args=\"{'mode': 'full'}\""
        )
    return {**record["config"]["eval_args"], "mode": {**given_mode(record["config"]), "test": mode}}
