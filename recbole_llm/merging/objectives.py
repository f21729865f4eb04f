"""What the entropy search minimises: how unsure a model is, on unlabelled prompts.

:func:`candidate_entropy` asks about the candidates; :func:`token_entropy` and :func:`first_k_entropy` about the first
answer tokens over the full vocabulary, as RecCocktail does (arXiv 2502.08271, equation 9). All are means of entropies
over users, not the entropy of mean logits, which two confident users of different taste would make large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from recbole_llm.llm.forward import positions

Batch = TypeVar("Batch")


def candidate_entropy(scores: Tensor) -> Tensor:
    """Mean over users of the entropy (nats) of the softmax over candidates.

    Args:
        scores: ``[B, C]`` log-likelihoods or logits; a candidate at ``-inf`` does not take part.
    """
    return _entropy(scores).mean()


def token_entropy(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over answer positions of the entropy (nats) of the next-token distribution.

    Args:
        logits: ``[B, k, V]``.
        counted: ``[B, k]``, False where an answer had already ended.
    """
    entropy = _entropy(logits)  # [B, k]
    return entropy.mean() if counted is None else entropy[counted].mean()


def first_k_entropy(
    model: Any, prompts: Sequence[Sequence[int]], k: int, pad_token_id: int, eos_token_id: int | None = None
) -> Tensor:
    """:func:`token_entropy` at the first ``k`` greedily decoded tokens of each prompt, differentiable in one forward.

    Decoding needs no gradient; one pass over prompt + answer then reads all ``k`` distributions.
    """
    if k < 1 or not prompts or not all(prompts):
        raise ValueError(f"first_k_entropy: needs k >= 1 and non-empty prompts, got k={k} and {len(prompts)} prompts")
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, L]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, L]
    # a distribution is read before its own token, so the k-th token is never an input
    ids, mask = _decode(model, ids, mask, k - 1)  # [B, L + k - 1]
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=k)
    logits = out.logits  # [B, k, V]
    if eos_token_id is None:
        return token_entropy(logits)
    ended = (ids[:, width:] == eos_token_id).cumsum(1) > 0  # [B, k - 1]
    return token_entropy(logits, torch.cat([ended.new_ones(len(ids), 1), ~ended], dim=1))  # counted: [B, k]


def mean_over_batches(term: Callable[[Tensor, Batch], Tensor], batches: Sequence[Batch]) -> Callable[[Tensor], Tensor]:
    """The mean of ``term(weights, batch)`` over batches of users, with the memory of one batch.

    Each batch's gradient is taken at once and its graph freed. The returned scalar carries the summed gradient, so a
    single ``backward`` on it works as on an ordinary mean; second derivatives are not kept.

    Args:
        term: the mean over the users of one batch.
        batches: sized collections of users; a batch counts by its size.
    """
    sizes = [len(batch) for batch in batches]  # type: ignore[arg-type]

    def objective(weights: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and weights.requires_grad):
            return sum(term(weights, b) * (n / sum(sizes)) for b, n in zip(batches, sizes, strict=True))  # type: ignore
        leaf = weights.detach().requires_grad_()
        value, gradient = torch.zeros_like(weights[..., 0].sum()).detach(), torch.zeros_like(leaf)
        for batch, size in zip(batches, sizes, strict=True):
            part = term(leaf, batch) * (size / sum(sizes))
            gradient += torch.autograd.grad(part, leaf)[0]
            value += part.detach().to(value.device)
        linear = (weights * gradient).sum()
        return value + linear - linear.detach()

    return objective


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    # 0 log 0 = 0, and so is its gradient
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


@torch.no_grad()
def _decode(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Append ``tokens`` greedy tokens to every row."""
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
