"""Likelihoods of candidate titles: from histories and candidates to scores.

::

    histories, candidates [B, C] --PromptBuilder--> prompts, answers --soft tokens [S, D]--> Scorer --> scores [B, C]

Legend: B users, C candidates, S soft tokens, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt, PromptBuilder
from recbole_llm.llm.scoring import Scorer

Histories = Sequence[Sequence[int]]
SoftTokens = Callable[[Sequence[Prompt], Histories, Sequence[int]], tuple[Sequence[Prompt], Tensor | None]]
"""Prompts, histories and user ids -> the prompts with numbered soft slots, and their vectors [S, D]."""


@dataclass(frozen=True)
class TitleLikelihood:
    """``log P(title | prompt)`` of candidates under one LM and one prompt format.

    Args:
        lm: a causal LM, or an :class:`~recbole_llm.llm.lora.AdapterView` of one.
        prompts: builds the prompts; if it has labels, a candidate's label is scored instead of its title.
        scorer: computes the likelihoods.
        several_titles: the LM was trained on answers of several titles, so a separator ends the first one.
        soft_tokens: fills the soft slots of prompts; ``user_key`` maps a row of the batch to the key of its user's slot.
        prior: its likelihood without a history is subtracted (``normalize: pmi``; Holtzman et al., EMNLP 2021,
            arXiv 2104.08315), so that rare or unseen titles are not penalised.
        known: what :meth:`without_history` has computed, by item; None: nothing is kept, since the LM is being trained.
    """

    lm: Any
    prompts: PromptBuilder
    scorer: Scorer
    several_titles: bool = False
    soft_tokens: SoftTokens | None = None
    user_key: Callable[[int], int] | None = None
    prior: TitleLikelihood | None = None
    known: dict[int, Tensor] | None = None

    def __call__(self, histories: Histories, candidates: Tensor, users: Sequence[int] | None = None) -> Tensor:
        """Scores [B, C] in fp32 of candidates [B, C] for B histories of internal item ids, oldest first; differentiable.

        ``users`` are internal user ids, for models that use more of a user than the history.
        """
        scores = self._likelihoods(histories, candidates, users)  # [B, C]
        return scores if self.prior is None else scores - self.prior.without_history(candidates)

    def with_lm(self, lm: Any) -> TitleLikelihood:
        """A copy with another LM, or other adapters."""
        return replace(self, lm=lm, prior=self.prior and replace(self.prior, lm=lm, known=None))

    def prompts_of(self, histories: Histories, candidates: Tensor) -> list[Prompt]:
        """The prompts of histories, with candidates [B, C] if prompts show them."""
        rows = candidates.tolist()
        shown = rows if self.prompts.shows_candidates else [None] * len(rows)
        keys = [self.user_key(row) if self.user_key else None for row in range(len(rows))]
        return [self.prompts.prompt(*parts) for parts in zip(histories, shown, keys, strict=True)]

    def tokens(self, histories: Histories, candidates: Tensor) -> tuple[list[int], list[int]]:
        """The tokens of each user's prompt, and of all answers that follow it."""
        prompts = [len(prompt) for prompt in self.prompts_of(histories, candidates)]
        if self.prompts.label_tokens:
            return prompts, [0] * len(prompts)
        return prompts, [sum(len(self._title(item)) for item in row) for row in candidates.tolist()]

    def without_history(self, candidates: Tensor) -> Tensor:
        """Likelihoods [B, C] without a history; each distinct title is scored once where prompts do not show candidates."""
        if self.prompts.shows_candidates:
            return self._likelihoods([[]] * len(candidates), candidates)
        items, place = candidates.cpu().unique(return_inverse=True)  # [N], [B, C]
        known, width = {} if self.known is None else self.known, candidates.size(1)
        if missing := [item for item in items.tolist() if item not in known]:
            rows = torch.tensor([*missing, *missing[:1] * (-len(missing) % width)]).view(-1, width)  # padded with the first
            known.update(zip(missing, self._likelihoods([[]] * len(rows), rows).flatten(), strict=False))
        found = torch.stack([known[item] for item in items.tolist()])  # [N]
        return found[place.to(found.device)]  # [B, C]

    def inputs(
        self, histories: Histories, candidates: Tensor, users: Sequence[int] | None = None
    ) -> tuple[Sequence[Prompt], Tensor | None]:
        """The prompts with numbered soft slots, and the vectors [S, D] of these slots if there are any."""
        prompts: Sequence[Prompt] = self.prompts_of(histories, candidates)
        if self.soft_tokens is None:
            return prompts, None
        return self.soft_tokens(prompts, histories, users or [0] * len(prompts))

    def _likelihoods(self, histories: Histories, candidates: Tensor, users: Sequence[int] | None = None) -> Tensor:
        prompts, soft = self.inputs(histories, candidates, users)
        if self.prompts.label_tokens:
            labels = [[token] for token in self.prompts.label_tokens[: candidates.size(1)]]
            answers = [labels] * len(candidates)
        else:
            answers = [[self._title(item) for item in row] for row in candidates.tolist()]
        return self.scorer(self.lm, prompts, answers, soft)  # [B, C]

    def _title(self, item: int) -> list[int]:
        """A title and what followed it in training: the end of the answer, or the separator of several titles."""
        longer = self.several_titles and self.prompts.shows_candidates
        return self.prompts.first_of_ranking(item) if longer else self.prompts.answers[item]


def remembering(likelihood: Any) -> Any:
    """A copy for an LM that does not change any more: its prior, if it has one, scores each title once for all calls."""
    prior = getattr(likelihood, "prior", None)
    return likelihood if prior is None else replace(likelihood, prior=replace(prior, known={}))
