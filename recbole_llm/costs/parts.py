"""The cost of training and of reading with an LM, counted by running the part's own code on a blank LM.

A count is exact if a part has at most :data:`EXACT` forward passes and thousands of tokens, or the limit that :func:`counting`
sets. Of a longer part, as many steps, at equal distances, are counted and extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_llm.costs.blank_lm import BlankLM
from recbole_llm.costs.shape import LMShape
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.memory import LOGITS_AT_ONCE, TrainingMemory, checkpoints, micro_batch_tokens, training_memory
from recbole_llm.store.contexts import holding
from recbole_llm.store.costs import Cost, Measured, Tokens, count, metered
from recbole_llm.training.loop import LoopOptions

EXACT = 5000
FP32 = 4  # bytes
_most: ContextVar[int] = ContextVar("most", default=EXACT)


def counting(most: int) -> AbstractContextManager[None]:
    """Count at most this many forward passes and thousands of tokens of a part."""
    return holding(_most, most)


def blank(outline: Outline) -> CausalLM:
    """A blank LM of an outline, with its tokenizer."""
    model, stands_for = BlankLM(outline.config, outline.dtype), torch.device(outline.device).type
    return BlankCausalLM(model, outline.tokenizer, outline.reading, stands_for)


@dataclass(frozen=True)
class BlankCausalLM(CausalLM):
    """A blank LM, whose tensors are on the CPU, in place of one on a device of the type ``stands_for``."""

    stands_for: str = "cpu"

    @property
    def device_type(self) -> str:
        return self.stands_for


def shape_of(outline: Outline) -> LMShape:
    """The shape of an outline."""
    return LMShape.of(outline.config, outline.dtype, load_in_4bit=outline.load_in_4bit, shards=outline.shards)


def counted(call: Callable[[int], Any], calls: int, *, gradients: bool) -> tuple[Tokens, Tokens, bool]:
    """Tokens with and without gradients of ``call(0) ... call(calls - 1)``, and whether all of them were counted.

    A call may return the number of its tokens without padding, with gradients, where the LM is not told.
    """
    real = done = 0
    number = calls
    with metered() as seen, torch.enable_grad() if gradients else torch.no_grad():
        while done < number:
            found = call(done * calls // number)
            real += found if isinstance(found, int) else 0
            done += 1
            if done == 1:  # which tells what a call takes: the passes, and the making of the prompts
                tokens = seen.trained + seen.read
                number = min(calls, max(1, _most.get() // max(1, tokens.passes, tokens.fed // 1000)))
    trained, share = replace(seen.trained, real=real or seen.trained.real), calls / max(1, number)
    return trained.times(share), seen.read.times(share), number == calls


def remembered(term: Callable[..., Any]) -> Callable[..., Tensor]:
    """``term(weights, *batch)`` with value 0, which runs once for each batch, with and without gradients.

    Later calls count the same tokens again, since on a blank LM they do not depend on the weights.
    """
    seen: dict[Any, Measured] = {}

    def run(weights: Tensor, *batch: Any) -> Tensor:
        gradients = torch.is_grad_enabled() and weights.requires_grad
        key = gradients, *map(id, batch)
        if key in seen:
            count(seen[key].trained, trained=True)
            count(seen[key].read, trained=False)
        else:
            with metered() as seen[key]:
                term(weights, *batch)
        return 0 * weights.sum()

    return run


@dataclass(frozen=True)
class Through:
    """How gradients go through an LM: the memory of a pass, and whether its layers are computed again in the backward pass."""

    memory: TrainingMemory
    checkpointing: bool = False


def training_of(outline: Outline, shape: LMShape, options: LoopOptions, **adapter: Any) -> Through:
    """Gradients through a frozen LM to an adapter of rank ``r`` with ``dropout``, or to the input alone."""
    again = checkpoints(options.gradient_checkpointing, shape.parameters)
    return Through(training_memory(outline.config, dtype=outline.dtype, checkpointing=again, **adapter), again)


def fitting_tokens(outline: Outline, shape: LMShape, options: LoopOptions, through: Through) -> int:
    """The padded tokens of a micro-batch that a run would choose now, once it has loaded the weights."""
    if options.batch_tokens is not None:
        return options.batch_tokens
    device = torch.device(outline.device)
    tokens = micro_batch_tokens(through.memory, device, options.max_memory, taken=0 if outline.loaded else shape.weight_bytes)
    return 1 << (tokens.bit_length() - 1)


@dataclass(frozen=True)
class Training:
    """A training of some parameters with an LM's loss.

    Attributes:
        loss: computes the losses of a step, see :func:`counted`.
        validate: one validation; all read the same number of tokens.
    """

    samples: int
    steps: int
    loss: Callable[[int], Any]
    parameters: int
    validations: int = 0
    validate: Callable[[], Any] | None = None

    def cost(self, shape: LMShape, through: Through, *, all_weights: bool = False, adapter: int | None = None) -> Cost:
        """The cost of training.

        Args:
            all_weights: the parameters are those of the LM, not beside it.
            adapter: weights beside the LM that multiply every token; default: the parameters.
        """
        trained, read, exact = counted(self.loss, self.steps, gradients=True)
        if self.validate is not None:
            validate = self.validate
            once = counted(lambda _: validate(), 1, gradients=False)[1]
            read += once.times(self.validations)
        beside = 0 if all_weights else self.parameters if adapter is None else adapter
        # forward; gradients of the layers' inputs; then those of all weights, or the layers again
        factor = 2 + all_weights + through.checkpointing
        memory = {
            "weights": 0 if all_weights else shape.weight_bytes,
            "trained weights": self.parameters * FP32,
            "gradients": self.parameters * FP32,
            "optimizer": 2 * self.parameters * FP32,
            "best weights": self.parameters * FP32 if self.validate is not None else 0,
        }
        step = {"activations": through.memory.per_token * trained.most_fed, "logits": loss_bytes(through.memory, shape, trained)}
        memory |= larger(step, shape.forward_bytes(read))
        return Cost(
            samples=self.samples,
            steps=self.steps,
            trained=trained,
            read=read,
            parameters=self.parameters,
            memory={name: size for name, size in memory.items() if size},
            train_flops=factor * shape.flops(trained) + (6.0 + 2.0 * through.checkpointing) * beside * trained.fed,
            read_flops=shape.flops(read) + 2.0 * beside * read.fed,
            exact=exact,
        )


def larger(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """The larger one of two sums of bytes by part."""
    return first if sum(first.values()) >= sum(second.values()) else second


def loss_bytes(memory: TrainingMemory, shape: LMShape, tokens: Tokens) -> int:
    """Bytes of the logits that the loss holds at once, and of their gradients: of all of a pass, or as many as are computed at a
    time."""
    at_once = max(LOGITS_AT_ONCE, shape.vocabulary)
    return memory.fixed * min(tokens.most_logits * shape.vocabulary, at_once) // at_once


def scoring_cost(
    outline: Outline, rows: Iterable[tuple[Callable[[Any], Any], int]], batches: Sequence[Any], *, users: int, note: str = ""
) -> Cost:
    """The cost of scoring batches by an LM.

    Args:
        rows: functions of a batch, each with the number of rows of the results that cost the same.
        batches: of users.
    """
    read, exact, shape = Tokens(), True, shape_of(outline)
    for score, number in rows:
        _, found, whole = counted(partial(_score, score, batches), len(batches), gradients=False)
        read, exact = read + found.times(number), exact and whole
    memory = {"weights": shape.weight_bytes} | shape.forward_bytes(read)
    return Cost(samples=users, read=read, memory=memory, read_flops=shape.flops(read), exact=exact, note=note)


def _score(score: Callable[[Any], Any], batches: Sequence[Any], i: int) -> None:
    score(batches[i])
