"""The run record, a JSON file with all that tables, tests and later runs need, and the table of a run."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recbole.utils import ModelType
from tabulate import tabulate

import recbole_llm
from recbole_llm.data import forms
from recbole_llm.data.split_facts import split_facts
from recbole_llm.evaluation import metrics, predictions, slices
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.evaluation.record_files import by_user
from recbole_llm.store.files import atomic_write
from recbole_llm.store.json_files import sealed

_INTERVAL = "half_width_95"
_LIBRARIES = ("recbole", "torch", "transformers", "peft", "numpy", "scipy", "pandas")


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or one of its controls.

    Attributes:
        half_width: of the 95 % confidence interval over users, for each metric that ranks determine.
        slices: users, metrics and half widths of each slice.
        users_per_second: speed of the evaluation.
        reranked: number of the retriever's items that the model ranks anew in a full ranking; 0 for none.
    """

    name: str
    metrics: dict[str, float]
    ranks: Ranks
    half_width: dict[str, float] = field(default_factory=dict)
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    users_per_second: float | None = None
    reranked: int = 0

    @property
    def reachable(self) -> float | None:
        """Share of the users whose target is among the re-ranked items: the highest Hit@k of any order of them."""
        if not self.reranked or not self.ranks.ranks:
            return None
        return sum(rank <= self.reranked for rank in self.ranks.ranks) / len(self.ranks.ranks)


class RunRecord:
    """Collects the rows of a run and writes them to one file."""

    def __init__(self, config: Any, trainer: Any, valid_data: Any, test_data: Any):
        self._config, self._trainer = config, trainer
        self._candidates = {
            phase: loader.candidates.sha256 for phase, loader in (("valid", valid_data), ("test", test_data)) if loader.candidates
        }
        data = test_data._dataset
        self._one_target = data.histories.one_target("test")
        self.user_ids = data.field2id_token[config["USER_ID_FIELD"]]
        self._test_rows = test_data.sample_size if test_data.users is None else len(test_data.users)
        self._scenario, self._masking = data.scenario.label, data.masking
        self._split_facts = split_facts(config, data)
        self._slices = slices.user_slices(data.histories, config["slices"]) if self._one_target else {}
        self.rows: list[Row] = []

    def add(self, name: str, result: Mapping[str, float], *, reranked: int = 0) -> None:
        """Add the result of the trainer's last evaluation, and an ``mrr`` without cutoff after a full ranking of all targets.

        Args:
            reranked: the items that were ranked anew; read in a full ranking alone.
        """
        ranks = single = self._trainer.ranks
        values = {key: float(value) for key, value in result.items()}
        if not self._one_target:  # a user with several targets has no rank
            ranks = single = Ranks()
        elif "test" not in self._candidates:
            single = ranks if len(ranks.ranks) == self._test_rows else Ranks()
            values |= {} if single.missed else metrics.metrics(single.ranks, ["mrr"])  # a missed target has no rank
        parts: dict[str, dict[str, Any]] = {}
        for part, own in slices.parted(single, self._slices).items():
            widths = metrics.half_widths(own.ranks, values)
            parts[part] = {"users": len(own.users), **metrics.metrics(own.ranks, values), _INTERVAL: widths}
        widths = metrics.half_widths(single.ranks, values)
        reranked = reranked if self._full else 0
        self.rows.append(Row(name, values, ranks, widths, parts, self._trainer.users_per_second, reranked))

    @property
    def _full(self) -> bool:
        return "test" in self._config["full_phases"]

    @property
    def protocol(self) -> dict[str, Any]:
        """How the data are split and test items ranked.

        ``mask_history`` is None for drawn candidates, which have their own rule. ``targets`` is ``one`` for each user; several
        are ranked ``together`` after the training history (RecBole's general models) or ``one by one``, each after those before
        it (sequential models).
        """
        several = "one by one" if self._config["MODEL_TYPE"] == ModelType.SEQUENTIAL else "together"
        return {
            **self._split_facts,
            "targets": "one" if self._one_target else several,
            "mask_history": self._masking.because is None if self._full else None,
            "unmasked_because": self._masking.because if self._full else None,
        }

    def _slice_users(self) -> dict[str, list[str]]:
        """The evaluated users of each slice, for paired tests within it."""
        evaluated = set(self.rows[0].ranks.users) if self.rows else set()
        return {name: sorted(str(self.user_ids[user]) for user in users & evaluated) for name, users in self._slices.items()}

    @property
    def heading(self) -> str:
        """Heading of the table: dataset, scenario, candidates, backbone, given adapters."""
        facts = self._trainer.recommender.facts()
        backbone = facts.backbone
        given = [f"{name}: {own['folder']} ({own['sha256'][:8]})" for name, own in facts.given_adapters.items()]
        users = len(self.rows[0].ranks.users)
        mode = self._config["eval_args"]["mode"]["test"]
        protocol = f"{users} users, candidates {self._candidates['test'][:12]}" if "test" in self._candidates else f"mode {mode}"
        if forms.draws(mode):
            protocol += " (negatives drawn anew in every evaluation: not comparable between runs)"
        if not self._one_target:
            protocol += f", several targets per user ranked {self.protocol['targets']}"
        protocol += f", {self._masking}" if self._full else ""
        parts = [self._config["dataset"], self._scenario, protocol, backbone and f"backbone: {backbone}"]
        parts += [f"given adapter {adapter}" for adapter in given]
        if imported := facts.imported:
            parts += [f"predictions {imported['file']} ({imported['sha256'][:8]})", imported["origin"], imported["remark"]]
        return ", ".join(filter(None, parts))

    def write(self, **facts: Any) -> Path:
        """Write the record to ``config.record_file``; returns its path."""
        config, path = self._config, self._config.record_file
        cache, known = self._trainer.cache, self._trainer.recommender.facts()
        content = {
            "model": config["model"],
            "dataset": config["dataset"],
            "seed": config["seed"],
            "results": {row.name: row.metrics for row in self.rows},
            _INTERVAL: {row.name: row.half_width for row in self.rows},
            "slices": {row.name: row.slices for row in self.rows},
            "slice_users": self._slice_users(),
            "ranks": {row.name: by_user(self.user_ids, row.ranks.users, row.ranks.ranks) for row in self.rows},
            "tie_rate": {row.name: row.ranks.tie_rate for row in self.rows},
            "missed_targets": {row.name: row.ranks.missed for row in self.rows},
            "reranked": {row.name: {"top": row.reranked, "reachable": row.reachable} for row in self.rows if row.reranked},
            "candidates_sha256": self._candidates,
            "protocol": self.protocol,
            "users_per_second": self.rows[0].users_per_second if self.rows else None,
            "trained_parameters": self._trainer.trained_parameters,
            "backbone": known.backbone,
            "backbone_fingerprint": known.backbone_fingerprint,
            "backbone_identity": known.backbone_identity,
            "merge": known.merge,
            "shortcut": self._trainer.recommender.shortcut,
            "given_adapters": known.given_adapters,
            "imported": known.imported,
            "memorisation": known.memorisation,
            "stages": {stage: folder.name for stage, folder in cache.folders.items()},
            "stage_seconds": cache.seconds,
            "config": config.plain(),
            "fingerprint": config.fingerprint,
            "versions": {"recbole_llm": recbole_llm.__version__, "python": platform.python_version()}
            | {library: version(library) for library in _LIBRARIES},
            "commit": commit(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        content["predictions"] = predictions.beside(config, content)
        atomic_write(path, sealed(content))
        return path


def commit() -> str | None:
    """The commit of the checkout that contains this code, with a + if files were changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment may be inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Row]) -> str:
    """Rows as plain text, with a confidence interval over users for the first metric.

    NDCG@1 and MRR@1 equal Hit@1 and are omitted with it. The last columns have the first metric of each slice of ``n`` users.
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
    found = tabulate(lines, headers=headers, disable_numparse=True)
    for row in rows:
        if row.reachable is not None:
            return (
                f"{found}\n{row.name}: the retriever's {row.reranked} items that are ranked anew contain the target of "
                f"{row.reachable:.1%} of the users, the highest Hit@k of any order of them"
            )
    return found
