"""The cost of training a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from recbole_llm.costs.activations import LENGTH, kept_bytes
from recbole_llm.costs.parts import Training, shape_of
from recbole_llm.costs.shape import blank_model
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.finetune import Encode, LoRATrainingConfig, schedule, with_adapter
from recbole_llm.llm.forward import lm_loss
from recbole_llm.store.costs import Cost
from recbole_llm.training.loop import validations


def lora_cost(
    outline: Outline,
    causal: CausalLM,
    examples: Sequence[Any],
    encode: Encode,
    config: LoRATrainingConfig,
    pad_token_id: int,
    validate: Callable[[Any], float] | None,
) -> Cost:
    """The cost of :func:`~recbole_llm.llm.finetune.finetune` with the same arguments.

    Args:
        outline: of the LM.
        causal: a blank LM of that outline.
    """
    batches, total, eval_every = schedule(examples, encode, config)
    model, parameters = with_adapter(blank_model(outline.config, outline.dtype), "planned", config)
    training = Training(
        samples=len(examples),
        steps=total,
        passes=total * batches.parts,
        loss=lambda micro: lm_loss(causal.model, batches[micro][0], pad_token_id),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        validations=validations(total, eval_every),
        validate=validate and (lambda: validate(causal.model)),
    )
    return training.cost(shape_of(outline), kept_bytes(model.train()) // LENGTH)
