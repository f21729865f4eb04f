"""Assembles the plan of a run: its stages, the training by RecBole's trainer if there is one, and the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from logging import getLogger
from typing import Any

import torch

from recbole_llm.classical.retriever import Retriever
from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.costs.devices import Card, Speed, of_card, probe
from recbole_llm.costs.parts import shape_of, training_of
from recbole_llm.costs.plan import TO_RUN, Line, Plan, estimated, stage_lines
from recbole_llm.evaluation.generated import PUBLISHED
from recbole_llm.llm.backbones import BUILTIN, Backbone, BackboneSettings
from recbole_llm.llm.identity import first_line
from recbole_llm.llm.memory import free_memory, tokens_in
from recbole_llm.store.costs import Cost
from recbole_llm.store.stages import Stage
from recbole_llm.training.loop import LoopOptions

logger = getLogger()

TRAINING, VALIDATION, TEST, ANSWERS = "training", "validation", "test", "answers"
GUESS = 5e10  # floating-point operations per second of this machine, to bound the measurement
SHARE = 0.005  # of the predicted time that the measurement at the start of a run may take
SHORTEST = 0.5  # seconds of a measurement that tells anything


def on_card(config: Any, card: Card) -> dict[str, Any]:
    """The settings that a run on an accelerator chooses by itself, for a plan on another machine."""
    chosen: dict[str, Any] = {} if config["dtype"] != "auto" else {"dtype": "bfloat16" if card.has_bf16 else "float32"}
    if config["score_batch_tokens"] is None:
        chosen["score_batch_tokens"] = 16384
    if config["train_batch_tokens"] is None and config["llm_path"] != BUILTIN:
        outline = Backbone(replace(BackboneSettings.of(config), dtype=chosen.get("dtype", config["dtype"]))).outline
        shape = shape_of(outline)
        lora = {"r": config["r"], "dropout": config["lora_dropout"]}
        through = training_of(outline, shape, LoopOptions.of(config), **lora)
        tokens = tokens_in(through.memory, card.memory - shape.weight_bytes, "other")
        chosen["train_batch_tokens"] = 1 << (tokens.bit_length() - 1)  # as in a run
    return chosen


def plan_of(
    trainer: ProtocolTrainer,
    stages: Sequence[Stage],
    train: Any,
    valid: Any,
    test: Any,
    retriever: Retriever | None = None,
    named: Card | None = None,
    *,
    patient: bool = False,
) -> Plan:
    """The plan of a run.

    Args:
        stages: those of ``trainer.plan``.
        train, valid, test: loaders.
        retriever: the source of the candidates, if it is a model.
        named: the accelerator; None: this machine, whose speed is measured.
        patient: measure the speed for short runs, too, and count more of long ones.
    """
    config, unknown = trainer.config, ""
    if retriever is not None and not trainer.cache.is_cached(retriever.stage):
        unknown = f"the candidates are those of {retriever.name}, which is not trained yet"
    elif retriever is not None:
        retriever.load(trainer.cache.folder(retriever.stage))
    lines = stage_lines(stages, trainer.cache, unknown=unknown)
    if not trainer.recommender.trained_in_stages:
        lines.append(Line(TRAINING, TO_RUN, estimated(partial(trainer.training_cost, train, valid))))
    validates = trainer.recommender.trained_in_stages and trainer.recommender.has_validation
    phases = [(VALIDATION, valid)] if validates else []
    for name, data in (*phases, (TEST, test)):
        cost = Cost(note=f"not estimated: {unknown}")
        if not unknown:
            cost = estimated(partial(trainer.evaluation_cost, data, early_stopping=name == VALIDATION))
        lines.append(Line(name, "", cost))
    if config["scoring"] == PUBLISHED and test.candidates and not unknown:
        found = estimated(partial(trainer.recommender.answers_cost, test.candidates))
        lines += [Line(ANSWERS, "", found)] if found else []
    backbone = trainer.recommender.backbone
    heading = f"{config['model']} on {config['dataset']}" + (f", backbone {backbone.name}" if backbone else "")
    plan = Plan(heading, lines)
    return Plan(heading, lines, _speed(plan, backbone, config, named, patient))


def _speed(plan: Plan, backbone: Backbone | None, config: Any, named: Card | None, patient: bool) -> Speed | None:
    if backbone is None or not plan.flops:
        return None
    outline = backbone.outline
    if named is not None:
        return of_card(named, outline.dtype, config["plan_efficiency"])
    seconds = plan.flops / GUESS * SHARE
    if not patient and seconds < SHORTEST:
        return None
    memory = free_memory(torch.device(outline.device), config["max_memory"])
    seconds = min(config["probe_seconds"], max(SHORTEST, seconds))
    try:
        return probe(outline.config, outline.dtype, outline.device, seconds, memory)
    except Exception as error:  # no memory, or what a family raises for two layers or for a LoRA of all of them
        logger.warning(f"plan: the speed of this machine cannot be measured ({first_line(error)}); no times are predicted")
        return None
