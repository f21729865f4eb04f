"""Soft tokens without values: the stand-in for a model's projectors in a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recbole_llm.costs.blank import Blank
from recbole_llm.data.prompts import Prompt, number_soft_tokens


@dataclass(frozen=True)
class BlankSoftTokens:
    """Numbers the soft slots of prompts as A-LLMRec's projectors do; their vectors are blank.

    Attributes:
        items: number of items, whose keys precede those of users.
        width: D.
    """

    items: int
    width: int

    def user_key(self, row: int) -> int:
        """The key of the user token of a row."""
        return self.items + row

    def __call__(self, prompts: Sequence[Prompt], *_: Any) -> tuple[list[Prompt], Tensor | None]:
        return self.fill(prompts)

    def fill(self, prompts: Sequence[Prompt], *_: Any) -> tuple[list[Prompt], Tensor | None]:
        """Prompts with numbered soft slots, and the blank vectors [S, D] of these slots."""
        numbered, keys = number_soft_tokens(prompts)
        return numbered, Blank.of((len(keys), self.width)) if keys else None
