"""The two phases and the warm-up: what each trains, when it stops, what it begins from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_llm.model.laser.towers import Towers
from recbole_llm.training.loop import TrainingLoop
from tests.model.laser.conftest import (
    BAD_PHASE2,
    QUICK,
    Made,
    batch_loss,
    close,
    equal,
    run_stages,
    stage_tensors,
    state,
    valid_score,
)

# -- two phases --------------------------------------------------------------------------------------------------------


def test_the_item_matrix_is_what_the_item_tower_encodes_and_not_the_users(made: Made) -> None:
    model, catalogue = made.model, [[item] for item in range(1, 41)]
    close(model.reader.encode(model.towers.item, catalogue), model.item_matrix[1:])
    assert (model.encode_histories(catalogue) - model.item_matrix[1:]).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"phase1_epochs": 0}, {"phase1_epochs": 0, "phase2_epochs": 0}])
def test_no_dropout_is_in_the_item_matrix(trained: Any, changes: dict[str, Any]) -> None:
    model = trained(**{**QUICK, **changes}, m_former_dropout=0.5).model
    close(model.encode_items(), model.item_matrix)


def test_after_phase_1_the_item_tower_is_the_user_tower_as_it_was_before_the_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, validate = [], TrainingLoop._validate

    def part(loop: TrainingLoop, name: str) -> dict[str, Tensor]:
        found = {key: tensor.detach().clone() for key, tensor in loop.parameters.items()}
        return {key.removeprefix(name): tensor for key, tensor in found.items() if key.startswith(name)}

    def spy(loop: TrainingLoop) -> None:
        before = len(loop.state.validations)
        validate(loop)
        if len(loop.state.validations) > before:
            seen.append([part(loop, "user."), part(loop, "item."), loop.state.best_step])

    monkeypatch.setattr(TrainingLoop, "_validate", spy)
    made = run_stages(assemble("Laser", module_settings, phase2_epochs=0, phase1_epochs=3, laser_patience=0))
    assert len(seen) == 3 and not any(equal(*towers) for *towers, _ in seen)
    for (user, _, _), (_, item, _) in zip(seen, seen[1:], strict=False):
        assert equal(user, item)  # what the epoch before left
    best = seen[seen[-1][2] // 4 - 1]
    for tower, expected in ((made.model.towers.user, best[0]), (made.model.towers.item, best[1])):
        assert equal(dict(tower.named_parameters()), expected)


def test_refresh_steps_renew_the_matrix_within_an_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, refresh = [], Towers.refresh
    monkeypatch.setattr(Towers, "refresh", lambda towers: (calls.append(1), refresh(towers)))
    for steps, expected in ((None, 2), (3, 3)):  # of eight steps in two epochs
        calls.clear()
        run_stages(assemble("Laser", module_settings, refresh_steps=steps, laser_patience=99, phase2_epochs=0))
        assert len(calls) == expected + 1  # and once before the first step


def test_both_phases_stop_when_validations_gain_nothing_and_return_to_the_best(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen, validated = assemble("Laser", module_settings, phase1_epochs=9, phase2_epochs=9, laser_patience=2), [], []
    scores = iter([0.4, 0.5, 0.4, 0.3, 0.5, 0.4, 0.3])  # phase 2 validates what it begins with

    def score(encode: Any, matrix: Tensor) -> float:
        seen.append((state(validated[-1].user), state(validated[-1].item)))
        return next(scores)

    monkeypatch.setattr(made.model, "_log_experts", lambda when, reader, towers: validated.append(towers))
    monkeypatch.setattr(made.model, "valid_score", score)
    towers = run_stages(made).model.towers
    assert len(seen) == 7 and next(scores, None) is None
    assert equal(state(towers.user), seen[1][0]) and equal(state(towers.item), seen[1][1])


@pytest.mark.parametrize("changes", [{}, BAD_PHASE2])
def test_phase_2_leaves_the_items_alone_and_never_ends_below_phase_1(trained: Any, changes: dict[str, Any]) -> None:
    model, one = trained(**changes).model, trained(phase2_epochs=0).model
    left = stage_tensors(trained(phase2_epochs=0), "phase-1")
    assert equal(state(model.towers.item), left["item_tower"]) and equal(state(one.towers.item), left["item_tower"])
    assert torch.equal(model.item_matrix, left["item_matrix"]["items"]) and torch.equal(one.item_matrix, model.item_matrix)
    assert valid_score(model) >= valid_score(one) > 0
    assert equal(state(model.towers.user), state(one.towers.user)) == (valid_score(model) == valid_score(one))
    if changes:  # harm is undone
        assert equal(state(model.towers.user), left["user_tower"])


def test_training_learns(trained: Any) -> None:
    fresh, learned = (trained(phase1_epochs=epochs, phase2_epochs=0, train_samples=80) for epochs in (0, 4))
    with torch.no_grad():
        assert batch_loss(learned) < 0.9 * batch_loss(fresh)


def test_a_phases_optimiser_is_as_its_settings_say_and_the_warm_up_balances_too(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"weight_decay": 0.07, "max_grad_norm": 0.3, "warmup_ratio": 0.5}
    rates = {"warmup_learning_rate": 1e-3, "phase1_learning_rate": 2e-3, "phase2_learning_rate": 3e-3}
    found, balance = {}, []

    def spy(loop: TrainingLoop) -> Any:
        (group,) = loop.optimizer.param_groups
        found[loop.name] = group["weight_decay"], loop.clip_grad_norm, group["initial_lr"], loop.scheduler.get_last_lr()
        if loop.name == "warmup":
            torch.manual_seed(0)  # of the dropout
            balance.append(sum(part().item() for part in loop.loss(0)))
        return loop.state

    monkeypatch.setattr(TrainingLoop, "run", spy)
    for weight in (5.0, 0.0):
        run_stages(assemble("Laser", settings, **QUICK, **given, **rates, warmup_epochs=1, load_balance_weight=weight))
    assert found == {  # a rate that rises from zero
        name: (0.07, 0.3, rates[f"{name}_learning_rate"], [0.0]) for name in ("warmup", "phase1", "phase2")
    }
    assert balance[0] - balance[1] > 0.9 * 5  # of experts used alike it is 1
