"""The cost of training the builtin LM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recbole_llm.costs.activations import LENGTH, kept_bytes
from recbole_llm.costs.parts import Training, blank, shape_of
from recbole_llm.costs.shape import blank_model
from recbole_llm.data.domains import Domain, united
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.builtin_lm import BuiltinLMConfig, lm_loss, training_batches
from recbole_llm.store.costs import Cost


def builtin_cost(outline: Outline, settings: dict[str, Any], domains: Sequence[Domain], seed: int) -> Cost:
    """The cost of the stage that :func:`~recbole_llm.llm.builtin_lm.builtin_stage` makes of the same arguments."""
    config, causal, shape = BuiltinLMConfig.read(settings), blank(outline), shape_of(outline)
    titles, histories = united(domains)
    batches = training_batches(outline.tokenizer, titles, histories, config, seed)
    training = Training(
        samples=int(np.count_nonzero([len(history) for history in histories])),
        steps=len(batches),
        passes=len(batches),
        loss=lambda step: lm_loss(causal.model, batches[step], config.dtype),
        parameters=shape.parameters,
    )
    model = blank_model(outline.config).train()
    cost = training.cost(shape, kept_bytes(model) // LENGTH, all_weights=True)
    # the passes have no mask, from which padding could be known: every token but a row's last one is an input, and has a target
    return replace(cost, trained=replace(cost.trained, real=cost.trained.logits))
