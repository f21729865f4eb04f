"""The run record: everything that a table or a test needs of a run, as one JSON file; and the table of a run."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

import recbole_llm
from recbole_llm.evaluation import slices
from recbole_llm.evaluation.evaluator import Ranks
from recbole_llm.training.checkpoint import atomic_write

_INTERVAL = "hit@1_half_width_95"
_LIBRARIES = ("recbole", "torch", "transformers", "peft", "numpy", "scipy", "pandas")


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or one of its controls; ``slices`` holds users and metrics of each slice."""

    name: str
    metrics: dict[str, float]
    ranks: Ranks
    half_width: float | None
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)


class RunRecord:
    """Collects the rows of a run and writes them, once, as a whole."""

    def __init__(self, config: Any, model: Any, trainer: Any, valid_data: Any, test_data: Any):
        self._config, self._model, self._trainer = config, model, trainer
        self._candidates = {
            phase: loader.candidates.sha256 for phase, loader in (("valid", valid_data), ("test", test_data)) if loader.candidates
        }
        data, protocol = test_data._dataset, config["eval_args"]
        last_item = protocol["split"] == {"LS": "valid_and_test"} and protocol["order"] == "TO"  # is the test target
        self._user_ids = data.field2id_token[config["USER_ID_FIELD"]]
        self._scenario = data.scenario.label
        self._slices = slices.user_slices(data.histories, config["slices"]) if last_item else {}
        self.rows: list[Row] = []

    def add(self, name: str, metrics: Mapping[str, float], ranks: Ranks) -> None:
        """Add a result with the ranks behind it."""
        parts = {
            part: {"users": len(own.users), **slices.metrics(own.ranks, self._config["topk"]), _INTERVAL: hit_interval(own)}
            for part, own in slices.parted(ranks, self._slices).items()
        }
        self.rows.append(Row(name, {key: float(value) for key, value in metrics.items()}, ranks, hit_interval(ranks), parts))

    @property
    def heading(self) -> str:
        """What the table is about: dataset, scenario, candidates, backbone."""
        backbone = getattr(self._model, "backbone_name", None)
        users = len(self.rows[0].ranks.users)
        mode = self._config["eval_args"]["mode"]["test"]
        protocol = f"{users} users, candidates {self._candidates['test'][:12]}" if "test" in self._candidates else f"mode {mode}"
        parts = [self._config["dataset"], self._scenario, protocol, backbone and f"backbone: {backbone}"]
        return ", ".join(filter(None, parts))

    def write(self, **facts: Any) -> Path:
        """Write ``<checkpoint_dir>/runs/<Model>-<dataset>-<fingerprint>/record.json``; returns its path."""
        config = self._config
        name = f"{config['model']}-{config['dataset']}-{config.fingerprint[:8]}"
        path = Path(config["checkpoint_dir"]) / "runs" / name / "record.json"
        keeper = getattr(self._model, "keeper", None)
        content = {
            "model": config["model"],
            "dataset": config["dataset"],
            "seed": config["seed"],
            "results": {row.name: row.metrics for row in self.rows},
            _INTERVAL: {row.name: row.half_width for row in self.rows},
            "slices": {row.name: row.slices for row in self.rows},
            "ranks": {
                row.name: {str(self._user_ids[user]): rank for user, rank in zip(row.ranks.users, row.ranks.ranks, strict=True)}
                for row in self.rows
            },
            "tie_rate": {row.name: row.ranks.tie_rate for row in self.rows},
            "candidates_sha256": self._candidates,
            "backbone": getattr(self._model, "backbone_name", None),
            "backbone_fingerprint": getattr(self._model, "backbone_fingerprint", None),
            "merge": getattr(self._model, "merge_report", None),
            "stage_seconds": keeper.seconds if keeper else None,
            "config": config.plain(),
            "fingerprint": config.fingerprint,
            "versions": {"recbole_llm": recbole_llm.__version__, "python": platform.python_version()}
            | {library: version(library) for library in _LIBRARIES},
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        atomic_write(path, json.dumps(content, indent=1, default=float))
        return path


def hit_interval(ranks: Ranks) -> float | None:
    """Half width of the 95 % interval of Hit@1 over users (normal approximation)."""
    if not ranks.ranks:
        return None
    hits = np.array(ranks.ranks) == 1
    return float(1.96 * hits.std() / np.sqrt(len(hits)))


def table(rows: Sequence[Row]) -> str:
    """Rows as plain text; the interval beside Hit@1 is over users. NDCG@1 and MRR@1 are Hit@1 and left out beside it.

    Hit@1 of each slice, of ``n`` users, stands in the last columns.
    """
    same = {"ndcg@1", "mrr@1"} if "hit@1" in rows[0].metrics else set()
    keys = [key for key in rows[0].metrics if key not in same]
    parts = {name: part["users"] for name, part in rows[0].slices.items() if "hit@1" in keys}
    lines = []
    for row in rows:
        cells = [f"{row.metrics[key]:.4f}" for key in keys]
        if row.half_width is not None and "hit@1" in keys:
            cells[keys.index("hit@1")] += f" ±{row.half_width:.3f}"
        cells += [f"{row.slices[name]['hit@1']:.4f} ±{row.slices[name][_INTERVAL]:.3f}" for name in parts]
        lines.append([row.name, *cells])
    return tabulate(
        lines, headers=["", *keys, *(f"hit@1 {name} (n={users})" for name, users in parts.items())], disable_numparse=True
    )
