"""Objectives of the entropy search, on unlabelled prompts.

:func:`candidate_entropy` is the entropy over the candidates; :func:`token_entropy` and :func:`first_k_entropy` are those of
the first answer tokens over the full vocabulary, as in RecCocktail (arXiv 2502.08271, equation 9). Each is the mean of the
users' entropies, not the entropy of the mean logits, which is large when confident predictions of two users differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from recbole_llm.llm.forward import positions
from recbole_llm.llm.packing import pad_left

Batch = TypeVar("Batch")


def candidate_entropy(scores: Tensor) -> Tensor:
    """Mean over users of the entropy (nats) of the softmax over candidates.

    Args:
        scores: ``[B, C]`` log-likelihoods or logits; a candidate at ``-inf`` is ignored.
    """
    return _entropy(scores).mean()


def token_entropy(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over users of the mean entropy (nats) of the next-token distribution at their answer positions.

    So the entropy of a user does not depend on the others in a batch.

    Args:
        logits: ``[B, k, V]``.
        counted: ``[B, k]``, False at positions after the end of an answer; a row has at least one True.
    """
    entropy = _entropy(logits)  # [B, k]
    if counted is None:
        return entropy.mean()
    return ((entropy * counted).sum(-1) / counted.sum(-1)).mean()


def first_k_entropy(
    model: Any, prompts: Sequence[Sequence[int]], k: int, pad_token_id: int, eos_token_id: int | None = None
) -> Tensor:
    """:func:`token_entropy` of the first ``k`` greedily decoded tokens of each prompt; differentiable.

    Decoding runs without gradients; one forward pass over prompts and answers then gives all ``k`` distributions.

    Raises:
        ValueError: ``k`` is below 1, or there are no prompts or empty ones.
    """
    if k < 1 or not prompts or not all(prompts):
        raise ValueError(f"first_k_entropy: needs k >= 1 and non-empty prompts, got k={k} and {len(prompts)} prompts")
    device = model.get_input_embeddings().weight.device
    padded, seen = pad_left([torch.tensor(prompt, device=device) for prompt in prompts], pad_token_id)  # [B, L]
    # the k-th distribution does not depend on the k-th token
    ids, mask = _decode(model, padded, seen.long(), k - 1)  # [B, L + k - 1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=k).logits  # [B, k, V]
    if eos_token_id is None:
        return token_entropy(logits)
    ended = (ids[:, padded.size(1) :] == eos_token_id).cumsum(1) > 0  # [B, k - 1]
    return token_entropy(logits, torch.cat([ended.new_ones(len(ids), 1), ~ended], dim=1))  # counted: [B, k]


def mean_over_batches(
    term: Callable[[Tensor, Batch], Tensor], batches: Sequence[Batch], *, measured: Sequence[Batch] | None = None
) -> Callable[[Tensor], Tensor]:
    """The mean of ``term(weights, batch)`` over all users, with the memory of one batch.

    The gradient of each batch is computed immediately and its graph freed. The returned scalar carries the summed gradient,
    so that ``backward`` works as on an ordinary mean; second derivatives are not available.

    Args:
        term: the mean over the users of one batch.
        batches: sized collections of users; each batch is weighted by its size.
        measured: the same users in the batches for evaluations without gradients, which need less memory; default ``batches``.
    """
    users = sum(len(batch) for batch in batches)  # type: ignore[arg-type]

    def objective(weights: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and weights.requires_grad):
            return sum(term(weights, batch) * (len(batch) / users) for batch in measured or batches)  # type: ignore
        leaf = weights.detach().requires_grad_()
        value, gradient = torch.zeros_like(weights[..., 0].sum()).detach(), torch.zeros_like(leaf)
        for batch in batches:
            part = term(leaf, batch) * (len(batch) / users)  # type: ignore[arg-type]
            gradient += torch.autograd.grad(part, leaf)[0]
            value += part.detach().to(value.device)
        linear = (weights * gradient).sum()
        return value + linear - linear.detach()

    return objective


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    # 0 log 0 = 0, with gradient 0
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


@torch.no_grad()
def _decode(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Append ``tokens`` greedily decoded tokens to each row."""
    cache: Any = None
    for _ in range(tokens):
        fresh = slice(None) if cache is None else slice(-1, None)
        out = model(
            input_ids=ids[:, fresh],
            attention_mask=mask,
            position_ids=positions(mask)[:, fresh],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)  # [B, L + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [B, L + 1]
    return ids, mask
