"""Towers and their reader without values: the stand-ins for those of ``model/laser/towers.py`` in a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recbole_llm.costs.blank import Blank
from recbole_llm.model.laser.towers import Tower, TowerReader, Towers


class BlankTower(Tower):
    """As many blank soft tokens as a tower of the same configuration has."""

    def __init__(self, soft_tokens: int, width: int):
        nn.Module.__init__(self)  # without the modules of a tower
        self.m_former, self._size = None, (soft_tokens, width)

    def forward(self, states: Tensor, known: Tensor) -> tuple[Tensor, None]:
        """Soft tokens [B, S, D] for states [B, N, H]."""
        return Blank.of((len(states), *self._size)), None


class BlankTowers(Towers):
    """Towers with a blank item matrix [I, D]."""

    def __init__(self, reader: TowerReader, items: int):
        nn.Module.__init__(self)
        config = reader.config
        soft = config.prefix * config.former.length + (config.pooling == "suffix")
        self.user = self.item = BlankTower(soft, reader.width)
        self.item_matrix = Blank.of((items, reader.width))


class BlankReader(TowerReader):
    """A reader whose collaborative states are blank."""

    def states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return Blank.of((len(histories), 1, 1)), torch.ones(len(histories), 1, dtype=torch.bool)
