"""Reports of expert routing: the shares of users in the log, each user's expert in a file, a plot by groups of users."""

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

DEGENERATE = 0.9  # a warning if one expert has a larger share of the users
LARGEST = 12  # the largest groups, which the plot shows


def log_shares(when: str, chosen: Sequence[int], number: int, balance_weight: float) -> None:
    """Log the share of users that each expert has; a warning if one expert has nearly all."""
    shares = np.bincount(chosen, minlength=number) / len(chosen)  # [K]
    shown = " ".join(f"{share:.2f}" for share in shares)
    if shares.max() > DEGENERATE:
        logger.warning(
            f"{when}: one expert has {shares.max():.0%} of the users (shares {shown}); raise load_balance_weight, "
            f"{balance_weight}, or lower num_experts, {number}"
        )
    else:
        logger.info(f"{when}: users by expert {shown}")


def report(folder: Path, chosen: Mapping[str, int], groups: Sequence[str], number: int, label: str) -> str:
    """Write ``experts.json`` (user -> expert) and ``experts.png`` (shares by the users' ``groups``); returns a log line."""
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
