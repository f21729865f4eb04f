"""Draws of candidates from titles and Python collections."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from recbole_llm.data import candidates
from recbole_llm.data.drawing import Catalogue, token_order
from recbole_llm.data.items import title_key


def draw(
    users: Sequence[str],
    targets: Sequence[int],
    exclude: Sequence[Collection[int]],
    titles: Sequence[str],
    item_ids: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    **options: Any,
) -> torch.Tensor:
    """Candidates [N, C] of a catalogue with these titles, ids and weights by internal id."""
    catalogue = Catalogue([*map(title_key, titles)], token_order(item_ids), weights)
    excluded = [np.array([*known], dtype=np.int64) for known in exclude]
    return candidates.draw(catalogue, users, np.array(targets, dtype=np.int64), excluded, item_ids, **options)
