"""The cost of training the builtin LM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recbole_llm.costs.parts import Through, Training, blank, shape_of
from recbole_llm.data.domains import Domain, united
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.builtin_lm import BuiltinLMConfig, lm_loss, training_batches
from recbole_llm.llm.memory import training_memory
from recbole_llm.store.costs import Cost


def builtin_cost(outline: Outline, settings: dict[str, Any], domains: Sequence[Domain], seed: int) -> Cost:
    """The cost of the stage that :func:`~recbole_llm.llm.builtin_lm.builtin_stage` makes of the same arguments."""
    config, causal, shape = BuiltinLMConfig.read(settings), blank(outline), shape_of(outline)
    titles, histories = united(domains)
    batches = training_batches(outline.tokenizer, titles, histories, config, seed)
    pad = outline.tokenizer.pad_token_id

    def loss(step: int) -> int:
        rows = batches[step]  # [B, T]
        lm_loss(causal.model, rows, config.dtype)
        return int((rows[:, 1:] != pad).sum())  # each of these has an input before it

    # a linear layer keeps its input for the gradient of its weights, as a LoRA of rank 1 without dropout does
    memory = training_memory(outline.config, dtype=outline.dtype, r=1)
    training = Training(
        samples=int(np.count_nonzero([len(history) for history in histories])),
        steps=len(batches),
        loss=loss,
        parameters=shape.parameters,
    )
    return training.cost(shape, Through(memory), all_weights=True)
