"""A model that scores 500 items for 30 users by products of vectors of width 8."""

from __future__ import annotations

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
USERS, ITEMS = torch.randn(30, 8, generator=GENERATOR), torch.randn(500, 8, generator=GENERATOR)
BIAS = torch.randn(500, generator=GENERATOR)
FEW = Interaction({"user": torch.arange(5)})
ALL = Interaction({"user": torch.arange(30)})


def product(interaction: Interaction) -> Tensor:
    """Scores [B, 500]."""
    return USERS[interaction["user"]] @ ITEMS.T
