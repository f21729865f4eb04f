"""Training examples of an LM: a history and the item that follows it -> token ids and a mask of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.data import negatives
from recbole_llm.data.domains import Domain
from recbole_llm.data.prompts import Example, PromptBuilder
from recbole_llm.settings import Settings


@dataclass(frozen=True)
class ExampleSettings(Settings):
    """What an example contains besides the history.

    Attributes:
        num_negatives: sampled items that are listed with the target, if prompts list candidates.
        top_k_target: number of titles of an answer: the target, then random other candidates.
        label_end: an answer that is a label has an end, too, as LlamaRec's code trains it.
        whole_histories: every title of a history is a target (``lora_train_mode: sequence``), not only the last one.
    """

    num_negatives: int
    top_k_target: int = 1
    label_end: bool = False
    whole_histories: bool = False

    @classmethod
    def of(cls, config: Any, **given: Any) -> ExampleSettings:
        """The settings of a configuration."""
        mode = config["lora_train_mode"]
        if mode not in ("prefix", "sequence"):
            raise ValueError(f"lora_train_mode: {mode} is neither prefix nor sequence")
        number = config["candidates"]["num_negatives"]
        return cls(number, config["top_k_target"] or 1, config["label_end"], mode == "sequence")


def check_negatives(domain: Domain, settings: ExampleSettings) -> None:
    """Check that every training history leaves enough items of the training split to list as negatives.

    Raises:
        ValueError: the message has the length of the longest history.
    """
    known = max((len(domain.excluded(history, history[-1])) for history in domain.histories if len(history) > 1), default=0)
    left = len(domain.trained_items) - known
    if left < settings.num_negatives:
        raise ValueError(
            f"candidates.num_negatives: {settings.num_negatives} is too large for list-wise training on {domain.name}, where a "
            f"history of {known} items leaves {left} of the {len(domain.trained_items)} items of the training split to list; "
            "lower it, or choose a prompt without candidates"
        )


class ExampleEncoder:
    """Makes the examples of one domain."""

    def __init__(self, domain: Domain, prompts: PromptBuilder, settings: ExampleSettings):
        self._domain, self._prompts, self._settings = domain, prompts, settings

    def __call__(
        self, items: Sequence[int], rng: np.random.Generator, user: int | None = None, *, known: Sequence[int] | np.ndarray
    ) -> Example:
        """The example of a history whose last item is the target.

        Args:
            items: internal ids, old to new.
            rng: samples the other candidates, if prompts list any.
            user: key of the user's soft token, if prompts have one.
            known: the user's whole training history, also what a prompt does not show and what follows the target: none of it
                is a negative, unless repeats are kept.
        """
        prompts, settings = self._prompts, self._settings
        if settings.whole_histories:
            return prompts.sequence(items)
        *history, target = items
        if not prompts.shows_candidates:
            return Example.of(prompts.prompt(history, None, user), prompts.answers[target])
        excluded = self._domain.excluded(known, target)
        listed = negatives.with_target(rng, target, excluded, self._domain.trained_items, settings.num_negatives)
        return Example.of(prompts.prompt(history, listed, user), self._answer(target, listed, rng))

    def _answer(self, target: int, listed: list[int], rng: np.random.Generator) -> list[int]:
        if self._prompts.label_tokens:
            label = self._prompts.label_tokens[listed.index(target)]
            return [label, *self._prompts.end] if self._settings.label_end else [label]
        others = rng.permutation([item for item in listed if item != target])[: self._settings.top_k_target - 1]
        return self._prompts.ranking([target, *others])
