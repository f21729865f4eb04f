"""Towers and their reader without values: the stand-ins for those of ``model/towers.py`` in a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.costs.blank import Blank
from recbole_llm.model.towers import TowerReader


class BlankTower(nn.Module):
    """As many blank soft tokens as a tower of the same configuration has."""

    m_former = None

    def __init__(self, soft_tokens: int, width: int):
        super().__init__()
        self._size = soft_tokens, width

    def forward(self, states: Tensor, known: Tensor) -> tuple[Tensor, None]:
        """Soft tokens [B, S, D] for states [B, N, H]."""
        return Blank.of((len(states), *self._size)), None


class BlankTowers(nn.Module):
    """Towers with a blank item matrix [I, D]."""

    def __init__(self, reader: TowerReader, items: int):
        super().__init__()
        config = reader.config
        soft = config.prefix * config.former.length + (config.pooling == "suffix")
        self.user = self.item = BlankTower(soft, reader.width)
        self.item_matrix: Any = Blank.of((items, reader.width))


class BlankReader(TowerReader):
    """A reader whose collaborative states are blank."""

    def states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return Blank.of((len(histories), 1, 1)), torch.ones(len(histories), 1, dtype=torch.bool)
