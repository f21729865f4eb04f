"""The likelihood of candidates under a causal LM: ``log P(answer | prompt)`` in fp32, differentiable.

Four strategies compute the same number. ``naive`` runs the model on every (prompt, answer) pair; the tests compare the
others with it. These run on each prompt once, read the first token of all answers at its last position, and differ in the rest:

    prefix   each answer in a row of its own, with a copy of the prompt's KV cache
    tree     all answers in one row after the prompt's KV cache, separated by a block mask and with restarting positions
    label    nothing else: every answer is one token

For ``C`` answers of ``A`` tokens after a prompt of ``L``, naive scoring costs ``C(L+A)`` tokens, the others ``L+CA``. The last
token of an answer is not an input, and ``lm_head`` runs only at positions whose logits are needed. Where the prompts of a call
begin with the same ``N`` tokens, the other strategies run these once, and ``L`` is the length of the rest.

Legend: B users, C candidates, N shared tokens, L prompt tokens, A answer tokens, S answer tokens in a user's row, D width,
V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.answer_loss import in_memory, is_bare
from recbole_llm.llm.forward import check_context, embedded, fed, positions
from recbole_llm.llm.packing import Branches, common_start, equal_lengths, pad_answers, pad_left, token_batches
from recbole_llm.store.processes import current

STRATEGIES = ("naive", "prefix", "tree", "label")
NORMALIZATIONS = ("sum", "mean")
SHARED_GAIN = 0.05  # the share of a call's prompt tokens from which on a shared beginning is run separately
LOGITS = {"cpu": 2**26}  # logits of a forward pass by device, 256 MB in fp32
LOGITS_ELSEWHERE = 2**30  # 2 GB in bf16
PADDING = {"cpu": 0.05}  # share of a batch that may be padding, by device; others prefer few batches
LOGITS_AT_ONCE = {"cpu": 2**18}  # logits upcast at a time: 1 MB in fp32, which fits into a CPU's cache
LOGITS_AT_ONCE_ELSEWHERE = 2**27  # 512 MB
LARGEST = 8  # logits of a position that are computed again in fp32 for the sum over the vocabulary


@dataclass(frozen=True)
class Scorer:
    """Scores candidates: ``scorer(model, prompts, answers) -> FloatTensor[B, C]``, fp32, in the order given.

    Args:
        strategy: 'naive', 'prefix', 'tree' (needs sdpa or eager attention) or 'label' (answers of one token each).
        normalize: 'sum' of the answer's token log-probabilities, or their 'mean'.
        pad_token_id: any valid id, for padding, which is masked; None never pads a prompt: those of equal lengths share a batch.
        batch_tokens: maximum number of padded tokens in a forward pass, copies of a cache included; a single user may exceed it.
        share: compute a common beginning of the prompts once.

    Raises:
        ValueError: an unknown strategy or normalisation, or no tokens in a batch.
    """

    strategy: str = "tree"
    normalize: str = "sum"
    pad_token_id: int | None = 0
    batch_tokens: int = 8192
    share: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"scorer strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize {self.normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {self.batch_tokens}")

    def __call__(
        self, model: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]], soft: Tensor | None = None
    ) -> Tensor:
        """``log P(answer | prompt)`` for each user's candidates.

        Args:
            prompts: B prompts; their soft slots index rows of ``soft`` [S, D].
            answers: B x C rows of token ids, none of them empty.

        Raises:
            ValueError: prompts and answers do not match, or do not fit the strategy or the model's context.
        """
        self._check(model, prompts, answers)
        embed = model.get_input_embeddings()
        shared = _read_shared(model, prompts[0].ids[: self._shared_tokens(prompts)])  # N tokens
        device, lengths = embed.weight.device.type, [len(prompt) - shared.tokens for prompt in prompts]
        together = [range(len(prompts))] if self.pad_token_id is not None else equal_lengths(prompts)
        batches = [
            [group[i] for i in batch]
            for group in together
            for batch in token_batches(
                [lengths[i] for i in group],
                [self._following(prompts[i], answers[i]) for i in group],
                self.batch_tokens,
                extra_budget=LOGITS.get(device, LOGITS_ELSEWHERE) // embed.weight.shape[0],
                padding=PADDING.get(device, 1.0),
            )
        ]
        calls = [
            partial(self._score, model, [prompts[i] for i in batch], [answers[i] for i in batch], soft, shared)
            for batch in batches
        ]
        scores = current().compute(calls, embed.weight.device)
        order = torch.tensor([i for batch in batches for i in batch])
        return torch.cat(scores)[order.argsort()]  # [B, C]

    def _score(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Sequence[int]]],
        soft: Tensor | None,
        shared: _Shared,
    ) -> Tensor:
        embed = model.get_input_embeddings()
        device = embed.weight.device
        ids = [torch.tensor([prompt.ids], device=device) for prompt in prompts]  # B x [1, N + L]
        rows = [embedded(embed, row, [prompt], soft)[0] for row, prompt in zip(ids, prompts, strict=True)]
        inputs = [row[shared.tokens :] for row in rows]  # B x [L], or [L, D] with soft tokens
        tokens, real = pad_answers(answers, self.pad_token_id or 0, device)  # [B, C, A]
        if self.strategy == "naive":
            logp = _naive(model, inputs, tokens)  # [B, C, A]
        else:
            several = tokens.shape[-1] > 1
            first, seen, cache = _read_prompts(model, inputs, tokens[..., 0], shared, use_cache=several)  # [B, C], [B, N + L]
            logp = first.unsqueeze(-1)  # [B, C, 1]
            if several:
                following = _prefix if self.strategy == "prefix" else _tree
                logp = torch.cat([logp, following(model, seen, cache, tokens, real)], dim=-1)  # [B, C, A]
        total = logp.where(real, 0.0).sum(-1)  # [B, C]
        return total / real.sum(-1) if self.normalize == "mean" else total

    def _shared_tokens(self, prompts: Sequence[Prompt]) -> int:
        """N: the tokens with which all prompts begin, if it pays to run them once."""
        if self.strategy == "naive" or not self.share or len(prompts) == 1:
            return 0
        ends = (min(prompt.soft_slots, default=len(prompt) - 1) for prompt in prompts)
        number = min(common_start([prompt.ids for prompt in prompts]), *ends, min(map(len, prompts)) - 1)
        saved = number * (len(prompts) - 1)
        return number if saved >= SHARED_GAIN * sum(map(len, prompts)) else 0

    def _following(self, prompt: Prompt, answers: Sequence[Sequence[int]]) -> int:
        """Number of tokens that one user adds to a batch behind the prompt: answers and, for 'prefix', copies of the cache."""
        lengths = [len(answer) - 1 for answer in answers]
        if self.strategy == "tree":
            return sum(lengths)
        copied = len(prompt) if self.strategy == "prefix" and max(lengths) else 0
        return len(lengths) * (copied + max(lengths))

    def _check(self, model: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> None:
        if not prompts or len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts and {len(answers)} rows of answers; give one row per prompt")
        if len({len(row) for row in answers}) != 1 or not answers[0]:
            raise ValueError("every prompt needs the same number of answers, at least one")
        if not all(len(prompt) for prompt in prompts) or not all(len(answer) for row in answers for answer in row):
            raise ValueError("a prompt or an answer has no tokens")
        if self.strategy == "label" and any(len(answer) != 1 for row in answers for answer in row):
            raise ValueError("strategy 'label' scores answers of one token; use 'tree' or 'prefix' for titles")
        if self.strategy == "tree":
            _check_tree(model.config)
        longest = max(len(prompt) + max(map(len, row)) - 1 for prompt, row in zip(prompts, answers, strict=True))
        check_context(model.config, longest, "a prompt and its answer have")


class _Shared(NamedTuple):
    """The common beginning of prompts: its number of tokens N, and its KV cache, of one row."""

    tokens: int = 0
    cache: Any = None

    def copies(self, number: int) -> Any:
        """The cache for ``number`` rows; the tensors of the original are not changed."""
        if self.cache is None:
            return None
        found = copy.copy(self.cache)
        found.layers = [copy.copy(layer) for layer in self.cache.layers]
        found.batch_repeat_interleave(number)
        return found


def _read_shared(model: Any, ids: Sequence[int]) -> _Shared:
    """One pass over the common beginning; it belongs to the adapters that the model has now."""
    if not ids:
        return _Shared()
    row = torch.tensor([ids], device=model.get_input_embeddings().weight.device)  # [1, N]
    return _Shared(len(ids), model(input_ids=row, use_cache=True, logits_to_keep=1).past_key_values)


@contextmanager
def _logits_at(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """In this block, ``lm_head`` runs on the hidden states at ``rows`` and ``columns`` [M] alone: logits are [1, M, V]."""

    def select(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs  # [B, T, D], on the device of the last layer
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0),)  # [1, M, D]

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class _Head:
    """``lm_head`` and the states [N, T, D] that it read in a forward pass; without states its logits are taken as they are.

    bfloat16 has steps of .06 to .125 at the size of logits, which would tie many labels. So the logits of answers are computed
    again in fp32, where the model leaves those of its head as they are, and so are the largest of each position, which
    make up nearly all of the sum over the vocabulary.
    """

    module: Any = None
    states: list[Tensor] = field(default_factory=list)

    def keep(self, _: Any, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        """A forward hook of the head."""
        self.states.extend(inputs)

    def logits(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
        """fp32 logits of ``tokens``, each at its row and column of the states; has the shape of ``tokens``."""
        (states,) = self.states
        device = states.device
        places = [part.to(device).flatten() for part in torch.broadcast_tensors(rows, columns, tokens)]
        step = max(1, LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE_ELSEWHERE) // states.shape[-1])
        with in_memory(self.module):
            weight, bias = self.module.weight, self.module.bias
            found = [
                (states[row, column].float() * weight[token].float()).sum(-1)
                for row, column, token in zip(*(part.split(step) for part in places), strict=True)
            ]
            logits = torch.cat(found).view(tokens.shape)
            return logits if bias is None else logits + bias[tokens.to(device)].float()

    def corrected(self, norm: Tensor, logits: Tensor) -> Tensor:
        """``norm`` [N * T], the log of the sum of exponentials of ``logits`` [N, T, V], with the largest of these in fp32."""
        rounded, tokens = logits.topk(min(LARGEST, logits.shape[-1]), sorted=False)  # [N, T, K]
        rows, columns = _grid(logits[..., 0])
        exact = self.logits(rows.unsqueeze(-1), columns.unsqueeze(-1), tokens).to(norm.device)  # [N, T, K]
        share = (rounded.float().flatten(0, 1) - norm.unsqueeze(-1)).exp().sum(-1)  # [N * T]
        others = norm + torch.log1p(-share.clamp(max=1 - 1e-6))
        return torch.cat([exact.flatten(0, 1), others.unsqueeze(-1)], -1).logsumexp(-1)


@contextmanager
def _head(model: Any) -> Iterator[_Head]:
    """In half precision, what ``lm_head`` reads in the forward pass in this block; an adapted head is not read."""
    module = model.get_output_embeddings()
    halves = type(module) is torch.nn.Linear and module.weight.dtype in (torch.float16, torch.bfloat16)
    if not halves or not is_bare(model, module):
        yield _Head()
        return
    found = _Head(module)
    hook = module.register_forward_hook(found.keep)
    try:
        yield found
    finally:
        hook.remove()


def _log_prob(logits: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor, head: _Head) -> Tensor:
    """fp32 log P of ``tokens``, each at its row and column of logits [N, T, V]; has the shape of ``tokens``."""
    step = max(1, LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE_ELSEWHERE) // logits.shape[-1])
    norm = torch.cat([some.float().logsumexp(-1) for some in logits.flatten(0, 1).split(step)])  # [N * T]
    if head.states:
        norm = head.corrected(norm, logits)
        chosen = head.logits(rows, columns, tokens).to(logits.device)
    else:
        chosen = logits[rows, columns, tokens].float()
    return chosen - norm.view(logits.shape[:2])[rows, columns]


def _log_prob_at(logits: Tensor, tokens: Tensor, real: Tensor, head: _Head) -> Tensor:
    """fp32 log P of ``tokens`` where ``real``, from the logits [1, M, V] of these in their order; 0 elsewhere."""
    targets = tokens[real]  # [M]
    found = _log_prob(logits, *_grid(targets[None]), targets, head)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(real, found)


def _grid(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column indices of tokens [N, T], for broadcasting."""
    rows, columns = (torch.arange(size, device=tokens.device) for size in tokens.shape)
    return rows.unsqueeze(-1), columns  # [N, 1], [T]


def _check_tree(config: Any) -> None:
    """A tree needs attention with an arbitrary mask in every layer."""
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"strategy 'tree' needs attn_implementation sdpa or eager, not {attention!r}; use 'prefix'")


def _naive(model: Any, prompts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Every answer after its whole prompt; a causal model ignores padding on the right, so there is no mask."""
    logp = []
    for prompt, answers in zip(prompts, tokens, strict=True):  # [L] or [L, D], [C, A]
        last = answers[:, :-1]  # [C, A - 1]
        following = model.get_input_embeddings()(last) if prompt.is_floating_point() else last
        rows = torch.cat([prompt.expand(len(last), *prompt.shape), following], dim=1)  # [C, L + A - 1] or [C, L + A - 1, D]
        with _head(model) as head:
            logits = model(**fed(rows), use_cache=False, logits_to_keep=answers.shape[1]).logits  # [C, A, V]
        logp.append(_log_prob(logits, *_grid(answers), answers, head))  # [C, A]
    return torch.stack(logp)  # [B, C, A]


def _read_prompts(
    model: Any, prompts: Sequence[Tensor], tokens: Tensor, shared: _Shared, use_cache: bool
) -> tuple[Tensor, Tensor, Any]:
    """One pass over the prompts behind their shared beginning.

    Returns log P of the first tokens [B, C], the mask of real columns [B, N + L], and the KV cache.
    """
    inputs, own = pad_left(prompts)  # [B, L] or [B, L, D], [B, L]
    seen = torch.cat([own.new_ones(len(own), shared.tokens), own], dim=-1)  # [B, N + L]
    with _head(model) as head:
        output = model(
            **fed(inputs),
            attention_mask=seen.long(),
            position_ids=shared.tokens + positions(own),
            past_key_values=shared.copies(len(own)),
            use_cache=use_cache or shared.tokens > 0,
            logits_to_keep=1,
        )
    users = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)  # [B, 1]
    first = _log_prob(output.logits, users, torch.zeros_like(users), tokens, head)  # [B, C]
    return first, seen, output.past_key_values if use_cache else None


def _prefix(model: Any, seen: Tensor, cache: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """log P of the second and later tokens, [B, C, A - 1]: B * C short rows, each with its own copy of the cache."""
    candidates, width = tokens.shape[1:]
    inputs = tokens[..., :-1].flatten(0, 1)  # [B * C, A - 1]
    mask = torch.cat([seen.repeat_interleave(candidates, 0), torch.ones_like(inputs, dtype=torch.bool)], -1)
    start = seen.sum(-1).repeat_interleave(candidates).unsqueeze(-1)  # [B * C, 1]
    cache.batch_repeat_interleave(candidates)
    with _logits_at(model, *real[..., 1:].flatten(0, 1).nonzero(as_tuple=True)), _head(model) as head:
        logits = model(
            input_ids=inputs,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            position_ids=start + torch.arange(width - 1, device=inputs.device),
        ).logits  # [1, M, V]
    return _log_prob_at(logits, tokens[..., 1:], real[..., 1:], head)  # [B, C, A - 1]


def _tree(model: Any, seen: Tensor, cache: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """log P of the second and later tokens, [B, C, A - 1]: one row per user, in which answers do not attend to each other."""
    branches, fed = Branches.of(tokens, real), real[..., 1:]
    visible = branches.visible(seen).unsqueeze(1)  # [B, 1, S, N + L + S]
    dtype = model.get_input_embeddings().weight.dtype
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    with _logits_at(model, fed.nonzero(as_tuple=True)[0], branches.slots[fed]), _head(model) as head:
        logits = model(
            input_ids=branches.tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            position_ids=seen.sum(-1, keepdim=True) + branches.depth,
        ).logits  # [1, M, V]
    return _log_prob_at(logits, tokens[..., 1:], fed, head)  # [B, C, A - 1]
