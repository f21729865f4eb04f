"""The cost of training a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recbole_llm.costs.parts import Training, fitting_tokens, shape_of, training_of
from recbole_llm.llm.adapter_folders import Adapter
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.causal_lm import CausalLM, blank_model
from recbole_llm.llm.finetune import LoRATrainingConfig, schedule
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import attach_lora, lora_modules
from recbole_llm.llm.micro_batches import Encode, MicroBatches
from recbole_llm.store.costs import Cost
from recbole_llm.training.loop import LoopOptions, validations


def lora_cost(
    outline: Outline,
    causal: CausalLM,
    examples: Sequence[Any],
    encode: Encode,
    config: LoRATrainingConfig,
    *,
    validate: Callable[[Any], float] | None,
    options: LoopOptions,
) -> Cost:
    """The cost of :func:`~recbole_llm.llm.finetune.finetune` with the same arguments.

    Args:
        outline: of the LM.
        causal: a blank LM of that outline.
    """
    shape = shape_of(outline)
    through = training_of(outline, shape, options, r=config.r, dropout=config.lora_dropout)
    batches = MicroBatches(examples, encode, config.batch_size, fitting_tokens(outline, shape, options, through), config.seed)
    total, eval_every = schedule(batches, config)

    def loss(step: int) -> int:
        parts = batches[step]
        for batch, _ in parts:
            lm_loss(causal.model, batch)
        return sum(len(example.row) - 1 for batch, _ in parts for example in batch)

    training = Training(
        samples=len(examples),
        steps=total,
        loss=loss,
        parameters=AdapterShape.of(outline, config).parameters,
        validations=validations(total, eval_every),
        validate=None if validate is None else partial(validate, causal.model),
    )
    return training.cost(shape, through)


@dataclass(frozen=True)
class AdapterShape:
    """An adapter without its weights: their number, the modules that it adapts, and its rank."""

    parameters: int
    modules: list[str]
    r: int

    @classmethod
    def of(cls, outline: Outline, config: LoRATrainingConfig) -> AdapterShape:
        """The adapter that a training with these settings makes."""
        model: Any = attach_lora(blank_model(outline.config, outline.dtype), name="planned", **config.adapter)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return cls(parameters, list(lora_modules(model)), config.r)

    @classmethod
    def of_adapter(cls, adapter: Adapter) -> AdapterShape:
        """The shape of an adapter with weights."""
        size = sum(tensor.numel() for tensor in adapter.tensors.values())
        return cls(size, adapter.modules, max(map(adapter.rank, adapter.modules)))
