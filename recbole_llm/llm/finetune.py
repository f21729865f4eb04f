"""LoRA fine-tuning of a frozen LM.

The loss is ``- sum_t log P(y_t | y_<t, x)`` over the tokens of the answer (RecCocktail, equations 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch

from recbole_llm.data.domains import POSITIONS
from recbole_llm.llm.forward import lm_loss, loss_scale
from recbole_llm.llm.lora import attach_lora, save_adapter
from recbole_llm.llm.micro_batches import Encode, MicroBatches, bounded_memory
from recbole_llm.settings import Settings
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import DEFAULT_OPTIONS, LoopOptions, Part, TrainingLoop, weighted
from recbole_llm.training.schedule import Schedule

logger = getLogger()


@dataclass(frozen=True)
class LoRATrainingConfig(Settings):
    """How an adapter is trained, under peft's names if there is one.

    Attributes:
        positions: which items of a history are targets, see :func:`~recbole_llm.data.domains.training_examples`.
        valid: what chooses the best weights: ``ranking`` of the validation candidates, or ``loss`` on held-out examples.
        held_out: share of the examples that is held out for that loss.
    """

    KEYS = {
        "train_mode": "lora_train_mode",
        "samples": "train_samples",
        "positions": "train_positions",
        "valid": "lora_valid",
        **{name: f"lora_{name}" for name in ("epochs", "batch_size", "learning_rate", "eval_steps", "patience")},
    }

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | Sequence[str]
    use_rslora: bool
    train_mode: str
    samples: int | None
    positions: str
    valid: str
    held_out: float
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Schedule
    max_grad_norm: float | None
    eval_steps: int | None
    patience: int
    seed: int

    def __post_init__(self) -> None:
        for key, value, names in (
            ("lora_valid", self.valid, ("ranking", "loss")),
            ("train_positions", self.positions, POSITIONS),
        ):
            if value not in names:
                raise ValueError(f"{key}: {value!r} is unknown; choose {', '.join(names)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out} is not a share between 0 and 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: {self.lora_dropout} is not a share of at least 0 and less than 1")
        if self.train_mode == "sequence" and self.positions != "all":
            raise ValueError(
                f"train_positions: {self.positions} needs lora_train_mode: prefix; with sequence every title is a target"
            )

    @property
    def adapter(self) -> dict[str, Any]:
        """The arguments of :func:`~recbole_llm.llm.lora.attach_lora`."""
        keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "seed")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def of(cls, config: Any, **given: Any) -> LoRATrainingConfig:
        """The settings of a configuration."""
        return super().of(config, schedule=Schedule.of(config), **given)


def finetune(
    model: Any,
    name: str,
    examples: Sequence[Any],
    encode: Encode,
    config: LoRATrainingConfig,
    *,
    validate: Callable[[Any], float] | None,
    score_name: str | None = None,
    work: Work,
    options: LoopOptions = DEFAULT_OPTIONS,
) -> None:
    """Train one adapter on ``examples`` and write it to ``work.out`` as a PEFT folder; ``model`` has no adapter afterwards.

    Args:
        model: the frozen causal LM.
        examples: inputs of ``encode``.
        validate: score (bigger is better) of the PeftModel in eval mode; the weights with the best score are written.
        score_name: its name; None: ``valid_metric``.
    """
    peft_model = attach_lora(model, name=name, **config.adapter)
    parameters = {key: value for key, value in peft_model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)

    def score() -> float:
        assert validate is not None
        peft_model.eval()
        with torch.no_grad():
            return validate(peft_model)

    try:
        with bounded_memory(model, options, work.scratch, r=config.r, dropout=config.lora_dropout) as tokens:
            batches = MicroBatches(examples, encode, config.batch_size, tokens, config.seed)
            total, eval_every = schedule(batches, config)

            def loss(step: int) -> Iterator[Part]:
                peft_model.train()
                for batch, share in batches[step]:
                    yield weighted(share, lm_loss, peft_model, batch)

            trainable = sum(parameter.numel() for parameter in parameters.values())
            logger.info(f"{name}: {len(examples)} training examples, {total} steps, {trainable:,} trainable parameters")
            TrainingLoop(
                name=name,
                parameters=parameters,
                optimizer=optimizer,
                scheduler=config.schedule.build(optimizer, total),
                loss=loss,
                total_steps=total,
                clip_grad_norm=config.max_grad_norm,
                validate=score if validate else None,
                eval_every=eval_every,
                patience=config.patience,
                folder=work.scratch / "loop",
                options=options,
                learning_rate_key="lora_learning_rate",
                score_name=score_name,
                loss_scale=loss_scale(model),
            ).run()
        save_adapter(peft_model, name, work.out)
    finally:
        peft_model.unload()


def schedule(batches: MicroBatches, config: LoRATrainingConfig) -> tuple[int, int]:
    """The number of steps, and that between two validations."""
    total = batches.steps_per_epoch * config.epochs
    return total, config.eval_steps or max(1, -(-total // 4))
