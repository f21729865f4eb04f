"""The contract of LLM rankers: a history and candidates in, the likelihoods of the candidates' titles out.

::

    interaction (item_id_list, item_length) --histories--> PromptBuilder --token ids--+
                                                                 soft tokens [S, D] --+--> Scorer --> scores [B, C]
    candidates [B, C] -------------------------------------> answers (titles) --------+

What is trained differs: an adapter of the LM (``model/lora_ranker.py``), or what stands in front of a frozen one
(``model/allmrec.py``), which fills the soft tokens of a prompt (:meth:`LLMRanker.soft_tokens`).

Legend: B users, L history items, C candidates, S soft tokens, D width of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.retriever import Retriever
from recbole_llm.data.domains import Domain
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.base import LLMRecommender, template
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.store.files import fingerprint

LABELS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]


class LLMRanker(LLMRecommender):
    """Base of models that rank candidates by the likelihood of their titles; in a full ranking they re-rank a retriever's."""

    def __init__(self, config: Any, dataset: Any):
        if "valid" not in dataset.candidates:
            raise ValueError(
                f"eval_args: {type(self).__name__} is stopped on validation candidates; for a full ranking of the test items "
                "give eval_args: {'mode': {'valid': 'candidates', 'test': 'full'}}"
            )
        self.letters = config["scorer"] == "label"  # prompts depend on it
        super().__init__(config, dataset)
        self.prompts = self._prompt_builder(self.domain)
        self.normalize = config["normalize"]
        length = "sum" if self.normalize == "pmi" else self.normalize
        batch_tokens = config["score_batch_tokens"] or (2048 if self._on_cpu else 16384)
        self.scorer = Scorer(config["scorer"], length, self.pad_token_id, batch_tokens)
        self.negatives = config["candidates"]["num_negatives"]
        self.retriever_top = config["retriever_top"]
        self._config = config  # for the retriever, which is configured as a run of its own
        self.top_k_target = config["top_k_target"] or 1
        self.asked = {phase: EvalUsers(self, phase, found) for phase, found in dataset.candidates.items()}

    def _prompt_settings(self, config: Any) -> dict[str, Any]:
        shared = super()._prompt_settings(config)
        return {
            **shared,
            "template": template(config, "labelled") if self.letters else shared["template"],
            "candidate_separator": config["candidate_separator"],
            "labels": LABELS[: config["candidates"]["num_negatives"] + 1] if self.letters else None,
        }

    # -- scores --------------------------------------------------------------------------------------------------------

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] in fp32 of candidates [B, C] for the histories of a RecBole interaction."""
        return self.score_histories(self._histories_of(interaction), candidates, interaction[self.USER_ID].tolist())

    def score_histories(
        self, histories: Sequence[Sequence[int]], candidates: Tensor, users: Sequence[int] | None = None
    ) -> Tensor:
        """Scores [B, C] in fp32 for B histories of internal item ids, old to new; differentiable.

        ``normalize: pmi`` takes off what the title's likelihood is without a history, so that a title is not put behind for
        being rare, or unseen (Holtzman et al., EMNLP 2021, arXiv 2104.08315).

        ``users`` holds internal user ids, for models to whom a user is more than a history.
        """
        scores = self._likelihoods(histories, candidates, users)  # [B, C]
        return scores - self._prior(candidates) if self.normalize == "pmi" else scores

    def _likelihoods(self, histories: Sequence[Sequence[int]], candidates: Tensor, users: Sequence[int] | None = None) -> Tensor:
        rows = candidates.tolist()
        shown = rows if self.prompts.shows_candidates else [None] * len(rows)
        asking = self._user_tokens(len(rows))
        prompts = [self.prompts.prompt(*parts) for parts in zip(histories, shown, asking, strict=True)]
        if self.letters:
            labels = [[token] for token in self.prompts.label_tokens[: candidates.size(1)]]
            answers = [labels] * len(rows)
        else:
            answers = [[self._title(item) for item in row] for row in rows]
        prompts, soft = self.soft_tokens(prompts, histories, users)
        return self.scorer(self.lm, prompts, answers, soft)  # [B, C]

    def _prior(self, candidates: Tensor) -> Tensor:
        """How likely titles are without any history, [B, C]."""
        if self.prompts.shows_candidates:
            return self._likelihoods([[]] * len(candidates), candidates)
        items, place = candidates.cpu().unique(return_inverse=True)  # [N], [B, C]
        width = candidates.size(1)
        rows = torch.cat([items, items[:1].expand(-len(items) % width)]).view(-1, width)  # each item once, then a filler
        return self._likelihoods([[]] * len(rows), rows).flatten()[place.to(self.device)]  # [B, C]

    def _user_tokens(self, number: int) -> list[int]:
        """Ids of the soft tokens of the users of a call, behind those of the items."""
        return [-1 - self.n_items - row for row in range(number)]

    def soft_tokens(
        self, prompts: list[list[int]], histories: Sequence[Sequence[int]], users: Sequence[int] | None
    ) -> tuple[list[list[int]], Tensor | None]:
        """Prompts whose soft tokens are numbered as the scorer wants them, and their vectors [S, D]; here, there are none."""
        return prompts, None

    def _title(self, item: int) -> list[int]:
        """A title as the LM learned to answer it: followed by its end, or by the separator of a longer answer."""
        longer = self.top_k_target > 1 and self.prompts.shows_candidates
        return self.prompts.first_of_ranking(item) if longer else self.prompts.answers[item]

    def predict(self, interaction: Any) -> Tensor:
        """RecBole's ``predict``: the score [B] of one item a row, as the only candidate."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)  # [B]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue: the retriever's, its top ``retriever_top`` put in the LLM's order.

        The re-ranked items keep the retriever's highest scores among themselves, so nothing crosses the seam below them.
        """
        scores = self.retriever.scores(interaction).float()  # [B, I]
        scores[:, 0] = -torch.inf
        best, items = scores.topk(self.retriever_top, dim=1)  # [B, N]
        order = self.score_candidates(interaction, items).argsort(dim=1, descending=True, stable=True)  # [B, N]
        return scores.scatter(1, items.gather(1, order), best)  # [B, I]

    @cached_property
    def retriever(self) -> CollaborativeModel:
        """Trained when a full ranking is first asked for."""
        retriever = Retriever(self._config)
        retriever.load(self.cache.run(retriever.stage))
        return retriever

    # -- training rows -------------------------------------------------------------------------------------------------

    def _encode(
        self,
        items: Sequence[int],
        prompts: PromptBuilder,
        domain: Domain,
        rng: np.random.Generator,
        user: int | None = None,
    ) -> tuple[list[int], list[int]]:
        """A history whose last item is the target, as a training row: token ids and answer mask."""
        *history, target = items
        if not prompts.shows_candidates:
            prompt, answer = prompts.prompt(history, None, user), prompts.answers[target]
        else:
            listed = _listed(target, set(items), domain.trained_items, self.negatives, rng)
            prompt = prompts.prompt(history, listed, user)
            answer = self._answer(target, listed, prompts, rng)
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def _answer(self, target: int, listed: list[int], prompts: PromptBuilder, rng: np.random.Generator) -> list[int]:
        if self.letters:
            return [prompts.label_tokens[listed.index(target)]]
        return prompts.ranking([target, *rng.permutation([i for i in listed if i != target])[: self.top_k_target - 1]])

    @property
    def answer_fingerprint(self) -> str | None:
        settings = [self.scorer, self.normalize, self.prompt_settings, self.backbone_fingerprint]
        return self.stages_fingerprint and fingerprint([self.stages_fingerprint, self.answering, settings])


def _listed(target: int, known: set[int], items: np.ndarray, number: int, rng: np.random.Generator) -> list[int]:
    """Training candidates: the target at a random place among ``number`` of ``items`` outside the history."""
    others: list[int] = []
    taken = known | {target}
    left = len(items) - len(taken)
    if left < number:
        raise ValueError(
            f"candidates.num_negatives: {number} is too large for list-wise training, a history leaves {left} of the "
            f"{len(items)} items of the training split to list"
        )
    while len(others) < number:
        item = int(items[rng.integers(len(items))])
        if item not in taken:
            taken.add(item)
            others.append(item)
    others.insert(int(rng.integers(number + 1)), target)
    return others
