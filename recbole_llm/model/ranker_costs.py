"""What the evaluation of a ranker costs, counted on an LM that computes nothing: its scores, and answers that it generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.costs.parts import scoring_cost, shape_of
from recbole_llm.evaluation.generated import USERS_AT_ONCE
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.generation import Generator
from recbole_llm.llm.likelihood import TitleLikelihood, remembering
from recbole_llm.store.costs import Cost, Tokens

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

Rows = Sequence[tuple[TitleLikelihood, int]]
"""Likelihoods under a blank LM, each with the number of rows of the results that cost the same."""
Batch = tuple[Any, Tensor | None]
"""An interaction of B users, and their candidates [B, C]; None in a full ranking."""


def scores_cost(
    outline: Outline,
    rows: Rows,
    score: Callable[[TitleLikelihood, Any, Tensor], Any],
    batches: Sequence[Batch],
    *,
    reranked: tuple[int, int],
    seed: int,
) -> Cost:
    """The cost of scoring.

    Args:
        reranked: items of the catalogue, and how many of them a retriever lists; random ones take their place.
    """

    def listed(interaction: Any, candidates: Tensor | None) -> Tensor:
        if candidates is not None:
            return candidates
        items, top = reranked
        return torch.from_numpy(np.random.default_rng(seed).integers(1, items, (len(interaction), top)))

    known = [(interaction, listed(interaction, candidates)) for interaction, candidates in batches]
    scored = [(partial(_of_batch, score, remembering(likelihood)), number) for likelihood, number in rows]
    users = sum(len(candidates) for _, candidates in known)
    chosen = all(candidates is not None for _, candidates in batches)
    remembers = any(remembering(likelihood) is not likelihood for likelihood, _ in rows)
    notes = [] if chosen else [f"random items in place of the {reranked[1]} that the retriever will choose"]
    notes += ["at most: titles that the validation reads without a history are not read again"] if remembers else []
    found = scoring_cost(outline, scored, known, users=users, note="; ".join(notes))
    return replace(found, exact=found.exact and chosen, at_most=remembers)


def _of_batch(
    score: Callable[[TitleLikelihood, Any, Tensor], Any], likelihood: TitleLikelihood, batch: tuple[Any, Tensor]
) -> Any:
    return score(likelihood, *batch)


def answers_cost(
    outline: Outline,
    rows: Rows,
    generator: Generator,
    inputs: Callable[[TitleLikelihood, Sequence[int], Tensor], Any],
    candidates: CandidateSet,
) -> Cost:
    """The largest cost of generating an answer for each user of a candidate set.

    Args:
        inputs: prompts and vectors of a likelihood, users and their candidates.
    """
    read, shape = Tokens(), shape_of(outline)
    for likelihood, number in rows:
        found = Tokens()
        for start in range(0, len(candidates.users), USERS_AT_ONCE):
            some = slice(start, start + USERS_AT_ONCE)
            prompts, _ = inputs(likelihood, candidates.users[some].tolist(), candidates.items[some])
            found += generator.most_tokens(likelihood.lm, prompts)
        read += found.times(number)
    return Cost(
        samples=len(candidates.users),
        read=read,
        memory={"weights": shape.weight_bytes} | shape.forward_bytes(read),
        read_flops=shape.flops(read),
        at_most=True,
        note=f"at most: an answer has up to {generator.max_new_tokens} tokens, and ends earlier once it is complete",
    )
