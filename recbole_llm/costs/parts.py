"""The cost of training and of reading with an LM, counted by running the part's own code on a blank LM.

A count is exact if a part has at most :data:`EXACT` passes. Of longer ones, so many passes at equal distances are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.costs.blank_lm import BlankLM
from recbole_llm.costs.shape import LMShape
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.store.costs import Cost, Tokens, metered

EXACT = 100
FP32 = 4  # bytes


def blank(outline: Outline) -> CausalLM:
    """A blank LM of an outline, with its tokenizer."""
    return CausalLM(BlankLM(outline.config, outline.dtype), outline.tokenizer)


def shape_of(outline: Outline) -> LMShape:
    """The shape of an outline."""
    return LMShape.of(outline.config, outline.dtype, load_in_4bit=outline.load_in_4bit)


def counted(call: Callable[[int], Any], passes: int, *, gradients: bool) -> tuple[Tokens, Tokens, bool]:
    """Tokens with and without gradients of ``call(0) ... call(passes - 1)``, and whether all of them were counted."""
    chosen = range(passes) if passes <= EXACT else [i * passes // EXACT for i in range(EXACT)]
    with metered() as seen, torch.enable_grad() if gradients else torch.no_grad():
        for i in chosen:
            call(i)
    share = passes / max(1, len(chosen))
    return seen.trained.times(share), seen.read.times(share), len(chosen) == passes


@dataclass(frozen=True)
class Training:
    """A training of some parameters with an LM's loss.

    Attributes:
        loss: the loss of a micro-batch; its value is not used.
        passes: number of micro-batches.
        validate: one validation, with its number; each reads the same.
    """

    samples: int
    steps: int
    passes: int
    loss: Callable[[int], Any]
    parameters: int
    validations: int = 0
    validate: Callable[[], Any] | None = None

    def cost(self, shape: LMShape, activations: int, *, all_weights: bool = False, note: str = "") -> Cost:
        """The cost of training.

        Args:
            activations: bytes that are kept for the gradient of one token.
            all_weights: the parameters are those of the LM, not an adapter beside it.
        """
        trained, read, exact = counted(self.loss, self.passes, gradients=True)
        if self.validate is not None:
            validate = self.validate
            once = counted(lambda _: validate(), 1, gradients=False)[1]
            read += once.times(self.validations)
        adapter = 0 if all_weights else self.parameters
        factor = 3 if all_weights else 2  # forward, gradients of inputs, gradients of weights
        memory = {
            "weights": 0 if all_weights else shape.weight_bytes,
            "trained weights": self.parameters * FP32,
            "gradients": self.parameters * FP32,
            "optimizer": 2 * self.parameters * FP32,
            "best weights": self.parameters * FP32 if self.validate is not None else 0,
        }
        step = {"activations": activations * trained.most_fed, "logits": training_logits(shape, trained)}
        scoring = shape.forward_bytes(read)
        memory |= max(step, scoring, key=lambda part: sum(part.values()))
        return Cost(
            samples=self.samples,
            steps=self.steps,
            trained=trained,
            read=read,
            parameters=self.parameters,
            memory={name: size for name, size in memory.items() if size},
            train_flops=factor * shape.flops(trained) + 6.0 * adapter * trained.fed,
            read_flops=shape.flops(read) + 2.0 * adapter * read.fed,
            exact=exact,
            note=note,
        )


def training_logits(shape: LMShape, tokens: Tokens) -> int:
    """Bytes of the logits of a training pass: in the LM's precision, and twice in fp32 (log-probabilities and gradient)."""
    return tokens.most_logits * shape.vocabulary * (shape.bytes + 2 * FP32)


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
        _, found, whole = counted(lambda i, score=score: score(batches[i]), len(batches), gradients=False)
        read, exact = read + found.times(number), exact and whole
    memory = {"weights": shape.weight_bytes} | shape.forward_bytes(read)
    return Cost(samples=users, read=read, memory=memory, read_flops=shape.flops(read), exact=exact, note=note)
