"""The run record: everything that a table, a test or a later run needs of a run, as one JSON file; and the table of a run."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

import recbole_llm
from recbole_llm.evaluation import metrics, slices
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.store.files import atomic_write

_INTERVAL = "half_width_95"
_LIBRARIES = ("recbole", "torch", "transformers", "peft", "numpy", "scipy", "pandas")


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or one of its controls.

    Attributes:
        half_width: of the 95 % interval over users, for each metric that the ranks give.
        slices: users, metrics and half widths of each slice.
    """

    name: str
    metrics: dict[str, float]
    ranks: Ranks
    half_width: dict[str, float] = field(default_factory=dict)
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)


class RunRecord:
    """Collects the rows of a run and writes them, once, as a whole."""

    def __init__(self, config: Any, trainer: Any, valid_data: Any, test_data: Any):
        self._config, self._trainer = config, trainer
        self._candidates = {
            phase: loader.candidates.sha256 for phase, loader in (("valid", valid_data), ("test", test_data)) if loader.candidates
        }
        data, protocol = test_data._dataset, config["eval_args"]
        last_item = protocol["split"] == {"LS": "valid_and_test"} and protocol["order"] == "TO"  # is the test target
        self._user_ids = data.field2id_token[config["USER_ID_FIELD"]]
        self._test_rows = test_data.sample_size
        self._scenario = data.scenario.label
        self._slices = slices.user_slices(data.histories, config["slices"]) if last_item else {}
        self.rows: list[Row] = []
        self._speeds: list[float | None] = []

    def add(self, name: str, result: Mapping[str, float]) -> None:
        """Add the result of the trainer's last evaluation; the ranks of a full ranking give an uncut ``mrr`` beside it."""
        ranks = self._trainer.ranks
        values = {key: float(value) for key, value in result.items()}
        told = ranks
        if "test" not in self._candidates:
            told = ranks if len(ranks.ranks) == self._test_rows else Ranks()  # a user with several targets has no rank
            values |= metrics.metrics(told.ranks, ["mrr"])
        parts = {
            part: {
                "users": len(own.users),
                **metrics.metrics(own.ranks, values),
                _INTERVAL: metrics.half_widths(own.ranks, values),
            }
            for part, own in slices.parted(told, self._slices).items()
        }
        self.rows.append(Row(name, values, ranks, metrics.half_widths(told.ranks, values), parts))
        self._speeds.append(self._trainer.users_per_second)

    @property
    def heading(self) -> str:
        """What the table is about: dataset, scenario, candidates, backbone."""
        backbone = self._trainer.recommender.facts().backbone
        users = len(self.rows[0].ranks.users)
        mode = self._config["eval_args"]["mode"]["test"]
        protocol = f"{users} users, candidates {self._candidates['test'][:12]}" if "test" in self._candidates else f"mode {mode}"
        parts = [self._config["dataset"], self._scenario, protocol, backbone and f"backbone: {backbone}"]
        return ", ".join(filter(None, parts))

    def write(self, **facts: Any) -> Path:
        """Write the record where the configuration says; returns its path."""
        config, path = self._config, self._config.record_file
        cache, known = self._trainer.cache, self._trainer.recommender.facts()
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
            "users_per_second": self._speeds[0] if self._speeds else None,
            "trained_parameters": self._trainer.trained_parameters,
            "backbone": known.backbone,
            "backbone_fingerprint": known.backbone_fingerprint,
            "merge": known.merge,
            "stages": {stage: folder.name for stage, folder in cache.folders.items()},
            "stage_seconds": cache.seconds,
            "config": config.plain(),
            "fingerprint": config.fingerprint,
            "versions": {"recbole_llm": recbole_llm.__version__, "python": platform.python_version()}
            | {library: version(library) for library in _LIBRARIES},
            "code": self._trainer.code,
            "commit": commit(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        atomic_write(path, json.dumps(content, indent=1, default=float))
        return path


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with a + where files were changed; None where it is in none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment may lie inside the checkout of another project
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Row]) -> str:
    """Rows as plain text; the interval beside the first metric is over users. NDCG@1 and MRR@1 are Hit@1 and left out beside it.

    The first metric of each slice, of ``n`` users, stands in the last columns.
    """
    same = {"ndcg@1", "mrr@1"} if "hit@1" in rows[0].metrics else set()
    first, *others = [key for key in rows[0].metrics if key not in same]
    parts = {name: part["users"] for name, part in rows[0].slices.items() if first in part}

    def cell(values: Mapping[str, float], half_width: Mapping[str, float]) -> str:
        return f"{values[first]:.4f}" + (f" ±{half_width[first]:.3f}" if first in half_width else "")

    lines = [
        [
            row.name,
            cell(row.metrics, row.half_width),
            *(f"{row.metrics[key]:.4f}" for key in others),
            *(cell(row.slices[name], row.slices[name][_INTERVAL]) for name in parts),
        ]
        for row in rows
    ]
    headers = ["", first, *others, *(f"{first} {name} (n={users})" for name, users in parts.items())]
    return tabulate(lines, headers=headers, disable_numparse=True)
