"""Objectives of the entropy search, on unlabelled prompts.

:func:`candidate_entropy` is the entropy over the candidates; :func:`first_tokens_entropy` is that of the first answer tokens over
the full vocabulary, as in RecCocktail (arXiv 2502.08271, equation 9). Each is the mean of the users' entropies, not the entropy
of the mean logits, which is large when confident predictions of two users differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from recbole_llm.llm.forward import positions
from recbole_llm.llm.packing import equal_lengths, pad_left

Batch = TypeVar("Batch")


def candidate_entropy(scores: Tensor) -> Tensor:
    """Mean over users of the entropy (nats) of the softmax over candidates.

    Args:
        scores: ``[B, C]`` log-likelihoods or logits; a candidate at ``-inf`` is ignored.
    """
    return entropies(scores).mean()


def token_entropies(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean entropy ``[B]`` (nats) of the next-token distribution at each user's answer positions.

    So the entropy of a user does not depend on the others in a batch.

    Args:
        logits: ``[B, k, V]``.
        counted: ``[B, k]``, False at positions after the end of an answer; a row has at least one True.
    """
    entropy = entropies(logits)  # [B, k]
    if counted is None:
        return entropy.mean(-1)
    return (entropy * counted).sum(-1) / counted.sum(-1)


@dataclass(frozen=True)
class Counted:
    """The answer tokens whose entropy counts: the first ``k`` of each title, of the first ``titles`` titles.

    Attributes:
        separator: the tokens between two titles of an answer; MoLoRec's code counts anew after each.
        most: answer tokens that are decoded at most.
    """

    k: int
    titles: int = 1
    separator: tuple[int, ...] = ()
    most: int = 400

    def __post_init__(self) -> None:
        if self.k < 1 or self.titles < 1 or (self.titles > 1 and not self.separator):
            raise ValueError(f"first tokens: needs k >= 1, and a separator for several titles, got {self}")

    @property
    def longest(self) -> int:
        """The answer tokens that may follow a prompt."""
        return self.k if self.titles == 1 else self.most

    def places(self, answer: Sequence[int], eos_token_id: int | None) -> tuple[list[int], bool]:
        """Places in an answer so far, its next token included, that count; and whether later ones cannot count."""
        found, begun, since = [], 1, 0
        for place in range(len(answer) + 1):
            if since < self.k:
                found.append(place)
            elif begun == self.titles:
                return found, True
            if place == len(answer):
                break
            since += 1
            if answer[place] == eos_token_id:
                return found, True
            if self.separator and tuple(answer[: place + 1][-len(self.separator) :]) == self.separator:
                if begun == self.titles:
                    return found, True
                begun, since = begun + 1, 0
        return found, len(answer) + 1 >= self.most or (begun == self.titles and since + 1 >= self.k)


def first_tokens_entropy(
    model: Any, prompts: Sequence[Sequence[int]], counted: Counted, pad_token_id: int | None, eos_token_id: int | None = None
) -> Tensor:
    """Mean over users of :func:`first_tokens_entropies`."""
    return first_tokens_entropies(model, prompts, counted, pad_token_id, eos_token_id).mean()


def first_tokens_entropies(
    model: Any, prompts: Sequence[Sequence[int]], counted: Counted, pad_token_id: int | None, eos_token_id: int | None = None
) -> Tensor:
    """:func:`token_entropies` ``[B]`` of the ``counted`` tokens of the greedily decoded answers of prompts; differentiable.

    Decoding runs without gradients; one forward pass over prompts and answers then gives all distributions.

    Raises:
        ValueError: there are no prompts or empty ones.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"first_tokens_entropy: needs non-empty prompts, got {len(prompts)} prompts")
    if pad_token_id is None:  # prompts of equal lengths together
        groups = equal_lengths(prompts)
        parts = [first_tokens_entropies(model, [prompts[i] for i in group], counted, 0, eos_token_id) for group in groups]
        return torch.cat(parts)[torch.tensor([i for group in groups for i in group]).argsort()]
    device = model.get_input_embeddings().weight.device
    padded, seen = pad_left([torch.tensor(prompt, device=device) for prompt in prompts], pad_token_id)  # [B, L]
    width = padded.size(1)

    def places(ids: Tensor) -> list[tuple[list[int], bool]]:
        return [counted.places(answer, eos_token_id) for answer in ids[:, width:].tolist()]

    # a distribution does not depend on its own token, so the last one that counts is not decoded
    ids, mask = _decode(model, padded, seen.long(), lambda ids: all([done for _, done in places(ids)]))  # [B, L + T]
    rows = [found for found, _ in places(ids)]
    columns = sorted({place for row in rows for place in row})  # k of them, where all rows count the same
    kept = torch.tensor(columns) + width - 1  # on the CPU, since it may index states of any device
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=kept).logits  # [B, k, V]
    return token_entropies(logits, torch.tensor([[c in row for c in columns] for row in rows], device=logits.device))


def mean_over_batches(
    term: Callable[[Tensor, Batch], Tensor],
    batches: Sequence[Batch],
    *,
    measured: Sequence[Batch] | None = None,
    scale: float = 1.0,
) -> Callable[[Tensor], Tensor]:
    """The mean of ``term(weights, batch)`` over all users, with the memory of one batch.

    The gradient of each batch is computed immediately and its graph freed. The returned scalar carries the summed gradient,
    so that ``backward`` works as on an ordinary mean; second derivatives are not available.

    Args:
        term: the mean over the users of one batch.
        batches: sized collections of users; each batch is weighted by its size.
        measured: the same users in the batches for evaluations without gradients, which need less memory; default ``batches``.
        scale: of the backward passes, see :func:`recbole_llm.llm.forward.loss_scale`.
    """
    users = sum(map(len, batches))  # type: ignore[arg-type]

    def objective(weights: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and weights.requires_grad):
            return sum(term(weights, batch) * (len(batch) / users) for batch in measured or batches)  # type: ignore
        leaf = weights.detach().requires_grad_()
        value, gradient = torch.zeros_like(weights[..., 0].sum()).detach(), torch.zeros_like(leaf)
        for batch in batches:
            part = term(leaf, batch) * (len(batch) / users)  # type: ignore[arg-type]
            gradient += torch.autograd.grad(part * scale, leaf)[0] / scale
            value += part.detach().to(value.device)
        linear = (weights * gradient).sum()
        return value + linear - linear.detach()

    return objective


def entropies(logits: Tensor) -> Tensor:
    """Entropy (nats) ``[...]`` of the softmax over the last dimension of logits ``[..., C]``; those at ``-inf`` are ignored."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    # 0 log 0 = 0, with gradient 0
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


@torch.no_grad()
def _decode(model: Any, ids: Tensor, mask: Tensor, done: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor]:
    """Append greedily decoded tokens to each row until ``done``."""
    cache: Any = None
    while not done(ids):
        fresh = slice(None) if cache is None else slice(-1, None)
        out = model(
            input_ids=ids[:, fresh],
            attention_mask=mask,
            position_ids=positions(mask)[:, fresh],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.get("past_key_values")  # some models have none: they read the whole rows again
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)  # [B, L + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [B, L + 1]
    return ids, mask
