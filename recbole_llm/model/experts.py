"""Who goes to which expert of a mixture: shares in the log, every user in a file, a picture by what users consume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np

from recbole_llm.evaluation import plots
from recbole_llm.store.files import atomic_write

logger = getLogger()

DEGENERATE = 0.9  # one expert with more of the users than that: there is no mixture
LARGEST = 12  # groups in the picture


def log_shares(when: str, chosen: Sequence[int], number: int, balance_weight: float) -> None:
    """How many of the users, whose experts are ``chosen``, go to each; said aloud where one expert takes nearly all."""
    shares = np.bincount(chosen, minlength=number) / len(chosen)  # [K]
    shown = " ".join(f"{share:.2f}" for share in shares)
    if shares.max() > DEGENERATE:
        logger.warning(
            f"{when}: one expert takes {shares.max():.0%} of the users (shares {shown}), so the mixture is none; raise "
            f"load_balance_weight, {balance_weight}, or lower num_experts, {number}"
        )
    else:
        logger.info(f"{when}: users by expert {shown}")


def report(folder: Path, chosen: Mapping[str, int], groups: Sequence[str], number: int, label: str) -> str:
    """Write ``experts.json``, the expert of each user, and ``experts.png``, by the users' ``groups``; returns a log line."""
    atomic_write(folder / "experts.json", json.dumps(chosen, indent=1))
    largest = Counter(groups).most_common(LARGEST)
    counts = Counter(zip(groups, chosen.values(), strict=True))
    table = np.array([[counts[group, expert] / size for expert in range(number)] for group, size in largest])  # [G, K]
    plots.heat_map(
        folder / "experts.png",
        table,
        rows=[f"{group} ({size})" for group, size in largest],
        columns=[str(expert) for expert in range(number)],
        title="Share of users by expert",
        row_label=f"{label} (users)",
        column_label="expert",
    )
    return f"experts of {len(chosen)} users: {folder / 'experts.png'}"
