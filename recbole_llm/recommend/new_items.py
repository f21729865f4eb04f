"""Scores of items that are not in the catalogue: what a model that reads texts makes of a title.

A ranker reads their titles in prompts. An encoder has a vector for each text: Laser by its item tower, as a history of one item
without a collaborative state; AlphaRec by its network, as an item without neighbours, of which LightGCN's convolution keeps the
direction; NearestTexts by its text encoder; ALLMRec, in its soft tokens, by the text code, as for items without interactions.

Legend: B users, C candidates, I items of the catalogue, N new items, T width of the text encoder, D of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from recbole_llm.evaluation.recommender import Variant
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.model.allmrec import ALLMRec
from recbole_llm.model.allmrec.projection import SoftTokens
from recbole_llm.model.alpharec import AlphaRec
from recbole_llm.model.laser import Laser
from recbole_llm.model.nearesttexts import NearestTexts
from recbole_llm.model.parts import histories_of
from recbole_llm.model.yes_no import YesNoLikelihood
from recbole_llm.recommend.past_run import PastRun
from recbole_llm.recommend.ranking import Score
from recbole_llm.registry import SHUFFLED

ScoreNew = Callable[[Any], Tensor]
"""Interaction of B users -> scores [B, N] of the new items."""


def scored_with(titles: Sequence[str], run: PastRun, row: str) -> Score:
    """The score of a row of a run, for which the internal ids I, I + 1, ... are the new items of ``titles`` [N].

    Raises:
        ValueError: the row cannot score items by their titles alone; names it and the remedy.
    """
    variant, number = run.variants[row], len(run.dataset.tokens[1])
    likelihood = _likelihood(variant)
    if likelihood is not None and SHUFFLED not in row:
        return _by_prompts(titles, run, likelihood)
    make = _BY_VECTORS.get(type(run.parts.model))
    if make is None or row != type(run.parts.model).__name__:
        raise ValueError(
            f"{row} cannot score an item by its title alone; give titles or ids of the catalogue, or a run of an LLM ranker "
            "(TALLRec, LoRACocktail, ...), Laser, AlphaRec or NearestTexts"
        )
    score_new = make(run.parts.model, run.parts.trainer.cache, titles)

    def score(interaction: Any, candidates: Tensor) -> Tensor:
        new = candidates >= number  # [B, C]
        known = variant.score(interaction, candidates.masked_fill(new, 1)).float().to(candidates.device)  # [B, C]
        own = score_new(interaction).float().to(candidates.device)  # [B, N]
        return known.where(~new, own.gather(1, (candidates - number).clamp(min=0)))

    return score


# -- rankers -----------------------------------------------------------------------------------------------------------


def _likelihood(variant: Variant) -> TitleLikelihood | YesNoLikelihood | None:
    """That of a row of a ranker, whose score is ``partial(score, likelihood)``."""
    given = variant.score.args if isinstance(variant.score, partial) else ()
    return next((part for part in given if isinstance(part, TitleLikelihood | YesNoLikelihood)), None)


def _by_prompts(titles: Sequence[str], run: PastRun, likelihood: TitleLikelihood | YesNoLikelihood) -> Score:
    model, cache = run.parts.model, run.parts.trainer.cache
    tokenizer = model.parts.backbone.load(cache).tokenizer
    names = [*model.parts.domain.items.names, *titles]

    def extended(likelihood: Any) -> Any:
        prompts = model.parts.builder(tokenizer, names=names, prompts=likelihood.prompts.settings)
        if not isinstance(likelihood, TitleLikelihood):
            return replace(likelihood, prompts=prompts)
        return replace(likelihood, prompts=prompts, prior=likelihood.prior and extended(likelihood.prior), known=None)

    own = extended(likelihood)
    if isinstance(model, ALLMRec) and isinstance(likelihood.soft_tokens, SoftTokens):
        soft = model.soft_tokens_of(titles, likelihood.soft_tokens, cache)
        own = replace(own, soft_tokens=soft, user_key=soft.user_key)

    def score(interaction: Any, candidates: Tensor) -> Tensor:
        return own(histories_of(model, interaction), candidates, interaction[model.USER_ID].tolist())

    return score


# -- encoders ----------------------------------------------------------------------------------------------------------


def _laser(model: Laser, cache: Any, titles: Sequence[str]) -> ScoreNew:
    vectors = model.encode_titles(titles)  # [N, D]
    return lambda interaction: model.encode_users(interaction) @ vectors.T


def _alpharec(model: AlphaRec, cache: Any, titles: Sequence[str]) -> ScoreNew:
    texts = model.text.load(cache).encode(titles, show_progress=False).to(model.device)  # [N, T]
    vectors = normalize(model.project(texts), dim=-1)  # [N, D]
    users, _ = model.forward()  # [U, D]
    return lambda interaction: users[interaction[model.USER_ID]] @ vectors.T


def _nearest_texts(model: NearestTexts, cache: Any, titles: Sequence[str]) -> ScoreNew:
    vectors = normalize(model.text.load(cache).encode(titles, show_progress=False).cpu(), dim=1).numpy()  # [N, T]

    def score(interaction: Any) -> Tensor:  # popularity, which breaks ties, is 0
        return torch.from_numpy(model.weighted_history(interaction, model.latest) @ model.vectors @ vectors.T)

    return score


_BY_VECTORS: Mapping[type, Callable[[Any, Any, Sequence[str]], ScoreNew]] = {
    Laser: _laser,
    AlphaRec: _alpharec,
    NearestTexts: _nearest_texts,
}
