"""A file of claims and the records of its runs, made by hand: two models of RecBole that no test trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from recbole_llm.classical.record_code import record_code
from recbole_llm.classical.record_inputs import record_inputs
from recbole_llm.evaluation import metrics
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.store.json_files import sealed

CLAIM = {
    "paper": "A paper",
    "claim": "The new model is better.",
    "published": ".9 against .1",
    "test": "new against old",
    "compare": {"better": "new", "worse": "old"},
    "metric": "Hit@1",
    "margin": 0.02,
}
PASSPORT = {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)}
_METRICS = ("hit@1", "ndcg@3")
USERS = 200


def ranks(share: float, seed: int = 0) -> np.ndarray:
    """Ranks [200] among 20 candidates, a share of them the first."""
    rng = np.random.default_rng(seed)
    found = rng.integers(2, 21, USERS)
    found[: round(share * USERS)] = 1
    return found


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of claims; the arguments change the claim ``better``, ``content`` the file."""

    def write(content: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        file = tmp_path / "mine.yaml"
        own = {
            "dataset": "ml-100k",
            "seeds": [1, 2],
            "shortcuts": False,
            "decide_on": {"train_batch_size": 64},
            "models": {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec"}},
            "claims": {"better": {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}},
        }
        file.write_text(yaml.safe_dump({**own, **(content or {})}, sort_keys=False))
        return file

    return write


@pytest.fixture
def finish(tmp_path: Path) -> Callable[..., None]:
    """Writes the record of each run of a label: the share of first ranks, by label; ``facts`` go into every record."""

    def write(file: Path, shares: Mapping[str, float], seeds: tuple[int, ...] = (1, 2), **facts: Any) -> None:
        for task in read_plan(file, {}):
            if task.label not in shares or task.seed not in seeds:
                continue
            places, row = ranks(shares[task.label], task.seed), task.model
            cold = places[: USERS // 4]
            slices = {"cold": {"users": len(cold), **metrics.metrics(cold, _METRICS)}}
            record = {
                "results": {row: metrics.metrics(places, _METRICS)},
                "ranks": {row: {f"u{user}": int(rank) for user, rank in enumerate(places)}},
                "slices": {row: slices},
                "slice_users": {"cold": [f"u{user}" for user in range(len(cold))]},
                "candidates_sha256": {"test": "c" * 64},
                "config": task.config.plain(),
                "passport": PASSPORT,
                "protocol": {"mask_history": None},
                "seconds": {"train": 30.0, "evaluate": 10.0},
                "stage_seconds": {},
                "backbone": None,
                "commit": "0123456789abcdef",
                "written": "2026-01-02T03:04:05Z",
                "fingerprint": task.config.fingerprint,
                "code": record_code(task.config),
                "inputs": record_inputs(task.config),
                **facts,
            }
            task.record.parent.mkdir(parents=True, exist_ok=True)
            task.record.write_text(sealed(record))

    return write
