"""A leaderboard with hostile labels, failures and missing values."""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_llm.classical.record_code import record_code
from recbole_llm.classical.record_inputs import record_inputs
from recbole_llm.evaluation import metrics
from recbole_llm.leaderboard.table import Cell
from recbole_llm.leaderboard.task import Task
from recbole_llm.store.json_files import sealed

SCRIPT = "<script>alert(1)</script>"
NASTY = 'a|b & 50% of_$x^2 {#1} "quoted", ~\\'
KNOWN = {  # as in a run record
    "titles": {"number": 200, "share": 0.62, "half_width_95": 0.067, "chance": 0.5, "difference": 0.4},
    "lines": {"number": 100, "share": 0.04, "half_width_95": 0.038, "chance": 0.05},
}
METRICS = ("hit@1", "ndcg@1", "ndcg@5")


def cell(label: str, share: float | None = None, *, seed: int = 1, protocol: str = "sampled", **changes: Any) -> Cell:
    """Ranks of 300 users, the first with probability ``share``."""
    fields: dict[str, Any] = {"model": "Model", "command": f"run --seed={seed} > '{SCRIPT}'", "commit": "0123abc"}
    if share is not None:
        rng = np.random.default_rng(seed)
        ranks = np.where(rng.random(300) < share, 1, rng.integers(2, 21, 300)).tolist()
        cold = {"users": 90, **metrics.metrics(ranks[:90], METRICS), "half_width_95": metrics.half_widths(ranks[:90], METRICS)}
        fields["record"] = {
            "model": "Model",
            "results": {"Model": metrics.metrics(ranks, METRICS)},
            "slices": {"Model": {"cold": cold}},
            "ranks": {"Model": {f"u{user}": rank for user, rank in enumerate(ranks)}},
            "candidates_sha256": {"test": "a" * 64},
            "passport": {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)},
            "protocol": {"mask_history": None},
            "seconds": {"train": 1000 * share},
            "trained_parameters": 1_234_567,
        } | changes.pop("facts", {})
    return Cell(label=label, seed=seed, protocol=protocol, **fields | changes)


def write_record(task: Task, best_valid_result: dict[str, float], results: dict[str, Any]) -> None:
    """The record of a run without the ranks of test users."""
    parts = {
        "results": results,
        "ranks": {},
        "slices": {},
        "passport": {"filters": {}, "sha256": {}},
        "protocol": {"mask_history": None},
    }
    task.record.parent.mkdir(parents=True, exist_ok=True)
    made_by = {"fingerprint": task.config.fingerprint, "code": record_code(task.config)} | {"inputs": record_inputs(task.config)}
    task.record.write_text(sealed({**parts, **made_by, "best_valid_result": best_valid_result}))
