"""The learning rate by step is that of transformers, for every kind that papers use."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from recbole_llm.training.schedule import Schedule


def rates(build: object, steps: int = 20) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    "schedule, reference",
    [
        (Schedule("cosine", 0.12), lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 3, 20)),  # a share is rounded up
        (Schedule("linear", 0.5, 4), lambda optimizer: get_linear_schedule_with_warmup(optimizer, 4, 20)),  # steps over the share
        (Schedule("linear", 0.5, 0), lambda optimizer: get_linear_schedule_with_warmup(optimizer, 0, 20)),
    ],
)
def test_a_schedule_is_that_of_transformers(schedule: Schedule, reference: object) -> None:
    assert rates(lambda optimizer: schedule.build(optimizer, 20)) == rates(reference)


@pytest.mark.parametrize(("steps", "warned"), [(19, False), (20, True), (100, True)])
def test_a_warm_up_longer_than_the_training_is_said(steps: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    rates(lambda optimizer: Schedule("linear", 0.0, steps).build(optimizer, 20))
    assert (f"warmup_steps: {steps} steps of rising learning rate are no fewer than the 20" in caplog.text) == warned


@pytest.mark.parametrize(("steps", "expected"), [(1, [2.0]), (2, [0.0, 2.0])])
def test_a_share_of_few_steps_leaves_one_that_trains(steps: int, expected: list[float]) -> None:
    assert rates(lambda optimizer: Schedule("cosine", 0.05).build(optimizer, steps), steps) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_warm_up_is_a_share_of_the_steps(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"warmup_ratio: {ratio} is not a share between 0 and 1"):
        Schedule("cosine", ratio)


def test_a_constant_rate_has_no_warm_up() -> None:
    assert rates(lambda optimizer: Schedule("constant", 0.5).build(optimizer, 20)) == [2.0] * 20
    assert rates(lambda optimizer: Schedule("constant_with_warmup", 0.1).build(optimizer, 20)) == [0.0, 1.0] + [2.0] * 18
