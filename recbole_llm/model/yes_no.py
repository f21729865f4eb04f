"""TALLRec in its original form (arXiv 2305.00447): the score of an item is P(Yes) against P(No) as the answer to a question.

The two answers follow the same question, so ``log P(target ... Yes) - log P(target ... No)`` is the difference of their first
tokens' logits: the log-odds that the user likes the item.

Legend: B users, C candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from recbole_llm.data import negatives
from recbole_llm.data.prompts import Example
from recbole_llm.data.yes_no import YesNoPrompts
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.adapters import AdapterSpec, AdapterTraining
from recbole_llm.model.ranker_parts import RankerParts

if TYPE_CHECKING:
    from recbole_llm.data.domains import Domain, TrainingExample
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.llm.micro_batches import Encode


@dataclass(frozen=True)
class YesNoLikelihood:
    """Scores candidates by the log-odds of Yes.

    Args:
        lm: a causal LM, or a view of its adapters.
        disliked: the items that each user dislikes, by internal user id.
    """

    lm: Any
    prompts: YesNoPrompts
    scorer: Scorer
    disliked: Sequence[Collection[int]]
    soft_tokens: None = None

    def __call__(self, histories: Sequence[Sequence[int]], candidates: Tensor, users: Sequence[int]) -> Tensor:
        """Scores [B, C] in fp32 of candidates [B, C] for B histories of internal item ids, oldest first."""
        prompts = [self.prompts.prompt(h, self.disliked[user]) for h, user in zip(histories, users, strict=True)]
        answers = [
            [[*self.prompts.target(item), answer[0]] for item in row for answer in (self.prompts.yes, self.prompts.no)]
            for row in candidates.tolist()
        ]
        scores = self.scorer(self.lm, prompts, answers)  # [B, 2 C]
        return scores[:, ::2] - scores[:, 1::2]  # [B, C]

    def with_lm(self, lm: Any) -> YesNoLikelihood:
        """A copy with another LM, or other adapters."""
        return replace(self, lm=lm)


@dataclass(frozen=True)
class YesNoParts(RankerParts):
    """The parts of a ranker that asks for Yes or No.

    Attributes:
        train_on_inputs: the loss is that of all tokens, not of the answer alone.
    """

    train_on_inputs: bool

    @cached_property
    def disliked(self) -> Sequence[Collection[int]]:
        """The items that each user dislikes; empty without ratings."""
        return self.histories.disliked or [frozenset()] * len(self.histories.items)

    def builder(self, tokenizer: Any, domain: Domain | None = None, *, names: Any = None, prompts: Any = None) -> Any:
        domain = domain or self.domain
        return YesNoPrompts(tokenizer, names or domain.items.names, settings=prompts or self.prompts, **domain.words)

    def likelihood(self, causal: CausalLM, prompts: Any = None, **parts: Any) -> Any:
        prompts = prompts or self.builder(causal.tokenizer)
        return YesNoLikelihood(causal.model, prompts, self.scorer(causal), self.disliked)


@dataclass(frozen=True)
class YesNoTraining(AdapterTraining):
    """Trains adapters on questions about the target's items."""

    parts: YesNoParts
    own_code = (__name__,)

    def examples_depend_on(self) -> Any:
        return [self.parts.histories.fingerprint, self.parts.train_on_inputs]  # the histories with what each user dislikes

    def encoder(self, spec: AdapterSpec, tokenizer: Any) -> Encode:
        """Encodes the training examples of the target.

        With ratings, the answer is whether the user likes the item. Without them every chosen item is liked, so in half of
        the examples an item that the user did not choose replaces it, if there is any, and the answer is No.
        """
        parts, prompts = self.parts, self.parts.builder(tokenizer)

        def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
            history, disliked = parts.domain.histories[example.user], parts.disliked[example.user + 1]
            item = int(history[example.end])
            likes = item not in disliked
            pool, known = parts.domain.trained_items, parts.domain.excluded(history, item)
            if parts.histories.disliked is None and rng.random() < 0.5 and len(known) < len(pool):
                (item,) = negatives.sample(rng, pool, known, 1)
                likes = False
            shown = history[: example.end].tolist()
            return prompts.example(shown, disliked, item, likes, train_on_inputs=parts.train_on_inputs)

        return encode
