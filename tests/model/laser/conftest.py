"""Trained models of Laser, which the tests of this folder share, and what they look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.model.laser.training import TowerTraining
from recbole_llm.model.parts import histories_of

Made = SimpleNamespace
QUICK = {"train_samples": 16, "valid_users": 8, "phase1_epochs": 1, "phase2_epochs": 1}
BAD_PHASE2 = {"phase2_learning_rate": 3.0}  # so large that it only does harm


@pytest.fixture(scope="session")
def trained(shared_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are cached, and training rows; made once."""
    cached: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in cached:
            made = assemble("Laser", shared_settings, **changes)
            made.lm = made.model.parts.backbone.load(made.trainer.cache).model
            made.lm_before = state(made.lm)
            run_stages(made).model.eval()
            made.batch = next(iter(made.train))[:9]
            cached[key] = made
        return cached[key]

    return trained


def run_stages(made: Made) -> Made:
    """What ``fit`` does before it validates."""
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    return made


@pytest.fixture(scope="session")
def made(trained: Callable[..., Made]) -> Made:
    return trained()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stage_tensors(made: Made, stage: str) -> dict[str, dict[str, Tensor]]:
    """The result of a stage, by file."""
    return {file.stem: load_file(file) for file in made.trainer.cache.folders[stage].glob("*.safetensors")}


def loss_of(
    model: Any, histories: Sequence[Sequence[int]], targets: Sequence[int], tokens: int = 10**6, **changes: Any
) -> list[Tensor]:
    """The parts of the loss of both phases, of the trained towers; no history loses its states or is cut unless asked for."""
    config = replace(model.training_config, **{"null_share": 0.0, "single_share": 0.0, **changes})
    training = TowerTraining(config, model.parts, model.reader, lambda *_: 0.0)
    return [part() for part in training.loss(model.towers, tokens)(histories, targets)]  # type: ignore[arg-type]


def batch_loss(made: Made, **changes: Any) -> Tensor:
    (loss,) = loss_of(made.model, histories_of(made.model, made.batch), made.batch["item_id"].tolist(), **changes)
    return loss


def valid_score(model: Any) -> float:
    return model.valid_score(model.encode_histories, model.item_matrix)


def close(one: Tensor, other: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)
