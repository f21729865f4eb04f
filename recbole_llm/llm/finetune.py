"""LoRA fine-tuning of a frozen LM.

The loss is ``- sum_t log P(y_t | y_<t, x)`` over the tokens of the answer (RecCocktail, equations 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch

from recbole_llm.data.prompts import Example
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import attach_lora, save_adapter
from recbole_llm.settings import Settings
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import DEFAULT_OPTIONS, Epochs, LoopOptions, TrainingLoop, cosine_with_warmup

logger = getLogger()

Encode = Callable[[Any, np.random.Generator], Example]
"""Encodes a training example; the generator draws its negative candidates, if any."""


@dataclass(frozen=True)
class LoRATrainingConfig(Settings):
    """How an adapter is trained, under peft's names if there is one."""

    KEYS = {
        "train_mode": "lora_train_mode",
        "samples": "train_samples",
        "accumulation": "gradient_accumulation_steps",
        **{name: f"lora_{name}" for name in ("epochs", "batch_size", "learning_rate", "eval_steps", "patience")},
    }

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | Sequence[str]
    use_rslora: bool
    train_mode: str
    samples: int | None
    epochs: int
    batch_size: int
    accumulation: int
    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float | None
    eval_steps: int | None
    patience: int
    seed: int


def finetune(
    model: Any,
    name: str,
    examples: Sequence[Any],
    encode: Encode,
    config: LoRATrainingConfig,
    pad_token_id: int,
    validate: Callable[[Any], float] | None,
    *,
    work: Work,
    options: LoopOptions = DEFAULT_OPTIONS,
) -> None:
    """Train one adapter on ``examples`` and write it to ``work.out`` as a PEFT folder; ``model`` has no adapter afterwards.

    Args:
        model: the frozen causal LM.
        examples: inputs of ``encode``.
        validate: score (bigger is better) of the PeftModel in eval mode; the weights with the best score are written.
    """
    peft_model, parameters = with_adapter(model, name, config)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    batches, total, eval_every = schedule(examples, encode, config)

    def loss(micro: int) -> torch.Tensor:
        peft_model.train()
        batch, share = batches[micro]
        return share * lm_loss(peft_model, batch, pad_token_id)

    def score() -> float:
        assert validate is not None
        peft_model.eval()
        with torch.no_grad():
            return validate(peft_model)

    loop = TrainingLoop(
        name=name,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=cosine_with_warmup(optimizer, total, config.warmup_ratio),
        loss=loss,
        total_steps=total,
        accumulate=batches.parts,
        clip_grad_norm=config.max_grad_norm,
        validate=score if validate else None,
        eval_every=eval_every,
        patience=config.patience,
        folder=work.scratch / "loop",
        options=options,
        learning_rate_key="lora_learning_rate",
    )
    trainable = sum(parameter.numel() for parameter in parameters.values())
    logger.info(f"{name}: {len(examples)} training examples, {total} steps, {trainable:,} trainable parameters")
    try:
        loop.run()
        save_adapter(peft_model, name, work.out)
    finally:
        peft_model.unload()


def with_adapter(model: Any, name: str, config: LoRATrainingConfig) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The model with an untrained adapter, and the adapter's parameters."""
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "seed")
    peft_model = attach_lora(model, name=name, **{key: getattr(config, key) for key in keys})
    return peft_model, {key: value for key, value in peft_model.named_parameters() if value.requires_grad}


def schedule(examples: Sequence[Any], encode: Encode, config: LoRATrainingConfig) -> tuple[Batches, int, int]:
    """The micro-batches, the number of steps, and the number of steps between two validations."""
    batches = Batches(examples, encode, config.batch_size, config.accumulation, config.seed)
    total = batches.steps_per_epoch * config.epochs
    return batches, total, config.eval_steps or max(1, -(-total // 4))


class Batches:
    """Micro-batches by index: micro-batch ``i`` is a function of (seed, i), so training can resume at any step.

    Each is a list of examples and its weight. With these weights, the mean loss over the ``parts`` of a step is the mean over
    all answer tokens of the step.
    """

    def __init__(self, examples: Sequence[Any], encode: Encode, batch_size: int, accumulation: int, seed: int):
        if batch_size % accumulation:
            raise ValueError(f"gradient_accumulation_steps: {accumulation} parts do not divide lora_batch_size: {batch_size}")
        self._examples, self._encode, self._seed = examples, encode, seed
        self._epochs = Epochs(len(examples), batch_size, seed)
        self.parts = min(accumulation, batch_size, len(examples))
        self.steps_per_epoch = self._epochs.steps

    def __getitem__(self, micro: int) -> tuple[list[Example], float]:
        step, part = divmod(micro, self.parts)
        epoch, chosen = step // self.steps_per_epoch, self._epochs[step]
        encoded = [self._encode(self._examples[i], np.random.default_rng([self._seed, epoch, int(i)])) for i in chosen]
        encoded.sort(key=lambda example: len(example.row))  # less padding
        size = len(encoded)
        taken = encoded[part * size // self.parts : (part + 1) * size // self.parts]
        answers, all_answers = (sum(sum(example.mask) for example in some) for some in (taken, encoded))
        return taken, answers / all_answers * self.parts
