"""The parts that all LLM models have: a domain, its histories, a backbone, prompts and training options.

``model/assembly.py`` builds them from a configuration. It is a separate module because a stage's fingerprint includes the
code that the stage imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.data.templates import PromptSettings
from recbole_llm.llm.backbones import Backbone

if TYPE_CHECKING:
    from recbole_llm.data.domains import Domain
    from recbole_llm.data.histories import Histories
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.training.loop import LoopOptions


@dataclass(frozen=True)
class Validation:
    """The criterion of early stopping and of the best weights: ``valid_metric`` of ``valid_users`` users.

    ``masked``: a full ranking leaves out the history.
    """

    metric: str
    users: int
    masked: bool


@dataclass(frozen=True)
class Parts:
    """The parts that rankers and encoders share."""

    domain: Domain
    histories: Histories
    backbone: Backbone
    prompts: PromptSettings
    validation: Validation
    options: LoopOptions
    seed: int

    @property
    def validates(self) -> bool:
        """Whether the split has validation data; without them, every training runs to its end."""
        return len(self.histories.evaluated("valid")) > 0

    def builder(
        self,
        tokenizer: Any,
        domain: Domain | None = None,
        *,
        names: Sequence[str] | None = None,
        prompts: PromptSettings | None = None,
    ) -> PromptBuilder:
        """A prompt builder for a domain, by default the target."""
        domain = domain or self.domain
        return PromptBuilder(tokenizer, names or domain.items.names, settings=prompts or self.prompts, **domain.words)

    def check(
        self, *, names: Sequence[str] | None = None, candidates: int = 1, titles: int = 1, decoded: int = 0, soft: int = 0
    ) -> None:
        """Refuse, before anything is trained, a backbone that is not exact or that this run's rows do not fit.

        Args:
            names: as in :meth:`builder`.
            candidates, titles, decoded, soft: largest numbers of candidates in a prompt, titles in an answer that is scored and
                in one that is decoded, and soft tokens beside them.
        """
        tokenizer = self.backbone.tokenizer
        if tokenizer is not None:
            prompts = self.builder(tokenizer, names=names)
            longest = prompts.longest(candidates, titles)
            if decoded:
                longest = max(longest, prompts.longest(candidates, 0) + prompts.decoded(decoded))
            self.backbone.check(longest + soft)


def default_batch_tokens(causal: CausalLM) -> int:
    """Tokens in one forward pass without gradients, if the configuration does not say how many."""
    return 2048 if causal.device_type == "cpu" else 16384


GRADIENT_BYTES = 2**30  # of the activations that a batch keeps for its gradients, unless one row needs more


def gradient_batch_tokens(causal: CausalLM) -> int:
    """Tokens in one forward pass with gradients through the whole LM, so that its activations take about a gigabyte.

    A token keeps at most 64 numbers a layer and unit of width: measured are 30 (SmolLM2) to 68 (Qwen2, where some are fp32).
    """
    config, weight = causal.model.config.get_text_config(), causal.model.get_input_embeddings().weight
    per_token = 64 * config.num_hidden_layers * config.hidden_size * weight.element_size()
    return max(1, GRADIENT_BYTES // per_token)


def histories_of(model: Any, interaction: Any) -> list[list[int]]:
    """The histories of a RecBole interaction: internal item ids, oldest first."""
    items, lengths = interaction[model.ITEM_SEQ].tolist(), interaction[model.ITEM_SEQ_LEN].tolist()
    return [row[:length] for row, length in zip(items, lengths, strict=True)]
