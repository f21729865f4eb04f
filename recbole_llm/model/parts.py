"""The parts that all LLM models are put together from: a domain, its histories, a backbone, prompts, and how they are run.

``model/assembly.py`` makes them of a configuration. They are apart since a stage depends on the code of what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recbole_llm.data.prompts import PromptBuilder, PromptSettings
from recbole_llm.llm.backbones import Backbone

if TYPE_CHECKING:
    from recbole_llm.data.domains import Domain
    from recbole_llm.data.histories import Histories
    from recbole_llm.training.loop import LoopOptions


@dataclass(frozen=True)
class Validation:
    """What stops a training and chooses its weights: ``valid_metric`` of ``valid_users`` users."""

    metric: str
    users: int


@dataclass(frozen=True)
class Parts:
    """What rankers and encoders share."""

    domain: Domain
    histories: Histories
    backbone: Backbone
    prompts: PromptSettings
    validation: Validation
    options: LoopOptions
    seed: int

    def builder(
        self,
        tokenizer: Any,
        domain: Domain | None = None,
        *,
        names: Sequence[str] | None = None,
        prompts: PromptSettings | None = None,
    ) -> PromptBuilder:
        """Builds the prompts of a domain, by default the target."""
        domain = domain or self.domain
        return PromptBuilder(
            tokenizer, names or domain.items.names, settings=prompts or self.prompts, noun=domain.noun, verb=domain.verb
        )


def histories_of(model: Any, interaction: Any) -> list[list[int]]:
    """The histories of a RecBole interaction, as internal item ids from old to new."""
    items, lengths = interaction[model.ITEM_SEQ].tolist(), interaction[model.ITEM_SEQ_LEN].tolist()
    return [row[:length] for row, length in zip(items, lengths, strict=True)]
