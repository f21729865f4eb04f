"""RecBole's Pop with right counts.

RecBole 1.2.1 adds 1 to the count of an item for each batch that contains it, however often it does, and its batches also have the
sampled negatives. So popular items are equal once they are in every batch, and the ranking depends on ``train_batch_size``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


def with_right_counts(model: Any, label: str) -> Any:
    """The model; if it is Pop, its counts are those of the positive training interactions, which the field ``label`` marks."""
    if type(model).__name__ == "Pop":
        vars(model)["calculate_loss"] = partial(_count, model, label)
    return model


def _count(model: Any, label: str, interaction: Interaction) -> Tensor:
    """Count the positive items of a batch; nothing is trained, so the loss is 0."""
    items = interaction[model.ITEM_ID]  # [B]
    if label in interaction.columns:
        items = items[interaction[label] > 0]
    model.item_cnt += torch.bincount(items, minlength=model.n_items).unsqueeze(1)
    model.max_cnt = model.item_cnt.max(dim=0).values
    return torch.zeros(1, device=model.device, requires_grad=True)
