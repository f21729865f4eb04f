"""What the LMs of a table know of the catalogue before any training, beside their results with shuffled titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from recbole_llm.leaderboard.digits import significant, with_half_width
from recbole_llm.leaderboard.table import Row, Table
from recbole_llm.registry import SHUFFLED

MEASUREMENTS = ("titles", "lines")
MEMORISED_WORDS = (
    "What each LM knows of the catalogue before any training, with 95 % intervals: how often a real title is more likely than "
    "one of other words (titles), and how often the next line of the .item file is the most likely one (lines)"
)


def memorised(table: Table) -> pd.DataFrame:
    """One line of texts for each backbone of which it was measured, not escaped; empty if it was measured of none."""
    backbones: dict[str | None, Row] = {}
    for row in table.rows:
        if row.memorisation:
            backbones.setdefault(row.backbone_fingerprint or row.backbone, row)
    lines = []
    for key, row in backbones.items():
        own = [other for other in table.rows if (other.backbone_fingerprint or other.backbone) == key]
        line = {"backbone": row.backbone or ""} | {name: _share((row.memorisation or {}).get(name)) for name in MEASUREMENTS}
        found = [(other.metrics.get(table.metric or ""), other.label) for other in own if other.model.endswith(SHUFFLED)]
        values = [f"{significant(value)} ({label})" for value, label in found if value is not None]
        lines.append(line | {f"{table.metric}, {SHUFFLED}": ", ".join(values)})
    return pd.DataFrame(lines, dtype=object)


def _share(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return ""
    return f"{with_half_width(part['share'], part['half_width_95'])} (chance {part['chance']:g})"
