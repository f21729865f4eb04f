"""The likelihood of candidates under a causal LM: ``log P(answer | prompt)`` in fp32, differentiable.

Four strategies compute the same number. ``naive`` runs the model on every (prompt, answer) pair; the tests compare the
others with it. These run on each prompt once, read the first token of all answers at its last position, and differ in the rest:

    prefix   each answer in a row of its own, with a copy of the prompt's KV cache
    tree     all answers in one row after the prompt's KV cache, separated by a block mask and with restarting positions
    label    nothing else: every answer is one token

For ``C`` answers of ``A`` tokens after a prompt of ``L``, naive scoring costs ``C(L+A)`` tokens, the others ``L+CA``. The last
token of an answer is not an input, and ``lm_head`` runs only at positions whose logits are needed.

Legend: B users, C candidates, L prompt tokens, A answer tokens, S answer tokens in a user's row, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.forward import embedded, positions
from recbole_llm.llm.packing import Branches, pad_answers, pad_left, token_batches

STRATEGIES = ("naive", "prefix", "tree", "label")
NORMALIZATIONS = ("sum", "mean")
LOGITS_AT_ONCE = 2**18  # logits upcast at a time: 1 MB in fp32, which fits into a CPU's cache


@dataclass(frozen=True)
class Scorer:
    """Scores candidates: ``scorer(model, prompts, answers) -> FloatTensor[B, C]``, fp32, in the order given.

    strategy: 'naive', 'prefix', 'tree' (needs sdpa or eager attention) or 'label' (answers of one token each).
    normalize: 'sum' of the answer's token log-probabilities, or their 'mean'.
    pad_token_id: any valid id, for padding, which is masked.
    batch_tokens: maximum number of padded tokens in a forward pass; a single user may exceed it.
    """

    strategy: str = "tree"
    normalize: str = "sum"
    pad_token_id: int = 0
    batch_tokens: int = 8192

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

        prompts: B prompts; their soft slots index rows of ``soft`` [S, D].
        answers: B x C rows of token ids, none of them empty.
        Raises ValueError if prompts and answers do not match, or do not fit the strategy or the model's context.
        """
        self._check(model, prompts, answers)
        batches = token_batches([*map(len, prompts)], [self._following(row) for row in answers], self.batch_tokens)
        scores = [self._score(model, [prompts[i] for i in batch], [answers[i] for i in batch], soft) for batch in batches]
        order = torch.tensor([i for batch in batches for i in batch])
        return torch.cat(scores)[order.argsort()]  # [B, C]

    def _score(
        self, model: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]], soft: Tensor | None
    ) -> Tensor:
        embed = model.get_input_embeddings()
        device = embed.weight.device
        ids = [torch.tensor([prompt.ids], device=device) for prompt in prompts]  # B x [1, L]
        inputs = [embedded(embed, row, [prompt], soft)[0] for row, prompt in zip(ids, prompts, strict=True)]  # B x [L, D]
        tokens, real = pad_answers(answers, self.pad_token_id, device)  # [B, C, A]
        if self.strategy == "naive":
            logp = _naive(model, inputs, tokens)  # [B, C, A]
        else:
            shared = tokens.shape[-1] > 1
            first, seen, cache = _read_prompts(model, inputs, tokens[..., 0], use_cache=shared)  # [B, C], [B, L]
            logp = first.unsqueeze(-1)  # [B, C, 1]
            if shared:
                following = _prefix if self.strategy == "prefix" else _tree
                logp = torch.cat([logp, following(model, seen, cache, tokens, real)], dim=-1)  # [B, C, A]
        total = logp.where(real, 0.0).sum(-1)  # [B, C]
        return total / real.sum(-1) if self.normalize == "mean" else total

    def _following(self, answers: Sequence[Sequence[int]]) -> int:
        """Number of answer tokens that one user adds to a batch."""
        lengths = [len(answer) - 1 for answer in answers]
        return sum(lengths) if self.strategy == "tree" else len(lengths) * max(lengths)

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
        context = getattr(model.config, "max_position_embeddings", longest)
        if longest > context:
            raise ValueError(
                f"a prompt and its answer have {longest} tokens, more than the model's context of {context}; "
                "lower max_prompt_tokens or max_history"
            )


def _log_prob(logits: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
    """fp32 log P of ``tokens``, each at its row and column of logits [N, T, V]; has the shape of ``tokens``."""
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    norm = torch.cat([some.float().logsumexp(-1) for some in logits.flatten(0, 1).split(step)])  # [N * T]
    return logits[rows, columns, tokens].float() - norm.view(logits.shape[:2])[rows, columns]


def _grid(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column indices of tokens [N, T], for broadcasting."""
    rows, columns = (torch.arange(size, device=tokens.device) for size in tokens.shape)
    return rows.unsqueeze(-1), columns  # [N, 1], [T]


def _check_tree(config: Any) -> None:
    """A tree needs attention with an arbitrary mask in every layer."""
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"strategy 'tree' needs attn_implementation sdpa or eager, not {attention!r}; use 'prefix'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("strategy 'tree' does not support sliding-window attention; use 'prefix'")


def _naive(model: Any, prompts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Every answer after its whole prompt; a causal model ignores padding on the right, so there is no mask."""
    logp = []
    for prompt, answers in zip(prompts, tokens, strict=True):  # [L, D], [C, A]
        following = model.get_input_embeddings()(answers[:, :-1])  # [C, A - 1, D]
        rows = torch.cat([prompt.expand(len(following), -1, -1), following], dim=1)  # [C, L + A - 1, D]
        logits = model(inputs_embeds=rows, use_cache=False, logits_to_keep=answers.shape[1]).logits  # [C, A, V]
        logp.append(_log_prob(logits, *_grid(answers), answers))  # [C, A]
    return torch.stack(logp)  # [B, C, A]


def _read_prompts(model: Any, prompts: Sequence[Tensor], tokens: Tensor, use_cache: bool) -> tuple[Tensor, Tensor, Any]:
    """One pass over the prompts: log P of the first tokens [B, C], mask of real columns [B, L], KV cache."""
    inputs, seen = pad_left(prompts)  # [B, L, D], [B, L]
    output = model(
        inputs_embeds=inputs, attention_mask=seen.long(), position_ids=positions(seen), use_cache=use_cache, logits_to_keep=1
    )
    users = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)  # [B, 1]
    return _log_prob(output.logits, users, torch.zeros_like(users), tokens), seen, output.past_key_values


def _prefix(model: Any, seen: Tensor, cache: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """log P of the second and later tokens, [B, C, A - 1]: B * C short rows, each with its own copy of the cache."""
    users, candidates, width = tokens.shape
    inputs, targets = tokens[..., :-1].flatten(0, 1), tokens[..., 1:].flatten(0, 1)  # [B * C, A - 1]
    mask = torch.cat([seen.repeat_interleave(candidates, 0), torch.ones_like(inputs, dtype=torch.bool)], -1)
    start = seen.sum(-1).repeat_interleave(candidates).unsqueeze(-1)  # [B * C, 1]
    cache.batch_repeat_interleave(candidates)
    logits = model(
        input_ids=inputs,
        attention_mask=mask.long(),
        past_key_values=cache,
        use_cache=True,
        position_ids=start + torch.arange(width - 1, device=inputs.device),
    ).logits  # [B * C, A - 1, V]
    return _log_prob(logits, *_grid(targets), targets).unflatten(0, (users, candidates))  # [B, C, A - 1]


def _tree(model: Any, seen: Tensor, cache: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """log P of the second and later tokens, [B, C, A - 1]: one row per user, in which answers do not attend to each other."""
    branches = Branches.of(tokens, real)
    visible = branches.visible(seen).unsqueeze(1)  # [B, 1, S, L + S]
    dtype = model.get_input_embeddings().weight.dtype
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    logits = model(
        input_ids=branches.tokens,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        position_ids=seen.sum(-1, keepdim=True) + branches.depth,
    ).logits  # [B, S, V]
    users = torch.arange(len(tokens), device=tokens.device)[:, None, None]  # [B, 1, 1]
    return _log_prob(logits, users, branches.slots, tokens[..., 1:])
