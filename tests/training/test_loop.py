"""A training that was interrupted and resumed ends with exactly the weights of one that was not."""

import contextlib
import logging
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recbole_llm.store import curves
from recbole_llm.training.loop import Epochs, LoopOptions, TrainingLoop, weighted
from recbole_llm.training.schedule import Schedule

STEPS = 8


class Interrupted(Exception):
    """Stands for a kill: nothing in the loop catches it."""


def make(folder=None, *, die_at=None, steps=STEPS, patience=0, best_at=None, accumulate=2, save_every=20.0, **settings):
    """A loop over a tiny network whose loss draws from the global generator (dropout), and what it saw on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1, bias=False))
    scale = nn.Parameter(torch.tensor(1.0))
    data = torch.randn(steps * accumulate, 5, 3)
    seen = SimpleNamespace(micro=[], checks=0, rates=[])

    def loss(step):
        for micro in range(step * accumulate, (step + 1) * accumulate):
            if die_at is not None and micro == die_at * accumulate + accumulate - 1:
                raise Interrupted
            seen.micro.append(micro)
            seen.rates.append(optimizer.param_groups[0]["lr"])
            yield weighted(1 / accumulate, lambda rows: (F.relu(model(rows)) * scale - 1).square().mean(), data[micro])

    def validate():
        seen.checks += 1
        torch.rand(seen.checks)  # a validation may draw, in whatever amount
        return float(-abs(loop.state.step - best_at))

    optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=0.1)
    loop = TrainingLoop(
        name="test",
        parameters=dict(model.named_parameters()) | {"scale": scale},
        optimizer=optimizer,
        scheduler=Schedule(warmup_ratio=0.25).build(optimizer, steps),
        loss=loss,
        total_steps=steps,
        clip_grad_norm=0.1,
        validate=None if best_at is None else validate,
        eval_every=2 if best_at is not None else 0,
        patience=patience,
        folder=folder,
        options=LoopOptions(save_every=save_every, show_progress=False),
        **settings,
    )
    return loop, seen


def weights(loop):
    return {name: parameter.detach().clone() for name, parameter in loop.parameters.items()}


def trained(**settings):
    loop, _ = make(**settings)
    loop.run()
    return weights(loop)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("die_at", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("validation", [{}, {"best_at": 4}, {"best_at": 2, "patience": 2}], ids=["no", "best", "stop"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, die_at, validation):
    whole = trained(**validation)
    loop, seen = make(tmp_path / "loop", die_at=die_at, save_every=0, **validation)
    try:
        loop.run()
    except Interrupted:
        assert max(seen.micro, default=0) <= 2 * die_at
    loop, resumed = make(tmp_path / "loop", save_every=0, **validation)
    loop.run()
    assert_equal(weights(loop), whole)
    if not validation:
        assert min(resumed.micro) == 2 * die_at  # nothing is trained twice
    assert len(list((tmp_path / "loop").iterdir())) == 1  # only the last save stays


def test_interrupted_again_and_again_equals_uninterrupted(tmp_path):
    for die_at in range(STEPS):
        with pytest.raises(Interrupted):
            make(tmp_path / "loop", die_at=die_at, save_every=0, best_at=6)[0].run()
    loop, _ = make(tmp_path / "loop", save_every=0, best_at=6)
    state = loop.run()
    assert_equal(weights(loop), trained(best_at=6))
    assert [entry["step"] for entry in state.validations] == [2, 4, 6, 8] and state.best_step == 6


def test_the_curve_of_an_interrupted_training_is_that_of_a_whole_one(tmp_path, monkeypatch):
    with curves.recording("steps") as steps:
        make(best_at=6)[0].run()
    monkeypatch.setattr(curves, "POINTS", 4)  # so every other step has a point, the mean loss of two
    with curves.recording("whole") as whole:
        make(best_at=6)[0].run()
    each = [loss for _, loss in steps.points["loss"]]
    assert len(each) == STEPS
    means = [(one + other) / 2 for one, other in zip(each[::2], each[1::2], strict=True)]
    assert [loss for _, loss in whole.points["loss"]] == pytest.approx(means)
    for die_at in (3, 4, None):
        with contextlib.suppress(Interrupted), curves.recording("stage", tmp_path / "curve.jsonl") as curve:
            make(tmp_path / "loop", die_at=die_at, save_every=0 if die_at != 4 else 20, best_at=6)[0].run()
    assert curve.points == whole.points
    assert {name: [step for step, _ in points] for name, points in curve.points.items()} == {
        "loss": [2, 4, 6, 8],
        "valid score": [2, 4, 6, 8],
    }


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_interrupted_within_a_save_equals_uninterrupted(tmp_path, monkeypatch, moment):
    from recbole_llm.store import files
    from recbole_llm.training import loop as module

    rename, names = files.os.replace, []

    def replace(source, target):
        names.append(target.name)
        if moment == "before the rename" and len(names) == 3:
            raise Interrupted
        rename(source, target)

    def rmtree(*_, **__):
        if moment == "after the rename" and len(names) == 3:
            raise Interrupted  # two saves are on disk now

    monkeypatch.setattr(files.os, "replace", replace)
    if moment == "after the rename":
        monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    with pytest.raises(Interrupted):
        make(tmp_path / "loop", save_every=0)[0].run()
    monkeypatch.undo()
    loop, seen = make(tmp_path / "loop", save_every=0)
    loop.run()
    assert seen.micro[0] == (4 if moment == "before the rename" else 6)
    assert_equal(weights(loop), trained())


def test_saving_changes_nothing_and_needs_its_time(tmp_path):
    assert_equal(trained(folder=tmp_path / "often", save_every=0), trained())
    trained(folder=tmp_path / "seldom", save_every=3600)
    assert not (tmp_path / "seldom").exists()


@pytest.mark.parametrize("file", ["tensors.safetensors", "values.json", "MANIFEST.json"])
def test_a_damaged_save_is_skipped_with_a_warning(tmp_path, caplog, file):
    with pytest.raises(Interrupted):
        make(tmp_path / "loop", die_at=4, save_every=0)[0].run()
    (save,) = (tmp_path / "loop").iterdir()
    older = tmp_path / "loop" / "step-2"
    with pytest.raises(Interrupted):
        make(tmp_path / "other", die_at=2, save_every=0)[0].run()
    (tmp_path / "other" / "step-2").rename(older)
    (save / file).write_bytes((save / file).read_bytes()[:-1])

    loop, seen = make(tmp_path / "loop", save_every=0)
    with caplog.at_level(logging.WARNING):
        loop.run()
    assert any(str(save) in message and "not resumed" in message for message in caplog.messages)
    assert seen.micro[0] == 4  # from the save before it
    assert_equal(weights(loop), trained())


def test_resuming_brings_the_schedule_along_without_a_warning(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path / "loop", die_at=3, save_every=0)[0].run()
    loop, whole = make()
    loop.run()
    loop, resumed = make(tmp_path / "loop", save_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.run()
    assert whole.rates[6:] == resumed.rates
    assert len(set(whole.rates)) > 4


# -- one run -----------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_training_stops_when_patience_ends():
    loop, seen = make(best_at=2, patience=2, steps=20)
    state = loop.run()
    assert (state.best_step, state.step, seen.checks) == (2, 6, 3)
    assert_equal(weights(loop), loop.best)
    patient, seen = make(best_at=2, patience=0)
    assert patient.run().best_step == 2 and seen.checks == 4


def test_the_last_step_is_validated_even_between_two_checks():
    loop, seen = make(best_at=7, steps=7)
    state = loop.run()
    assert state.best_step == 7 and seen.checks == 4


def test_validation_does_not_disturb_the_random_stream():
    assert_equal(trained(best_at=STEPS), trained())  # the best step is the last one, so the weights are comparable


def test_parts_add_up_and_clipping_limits_the_gradient():
    def one_step(batches, clip):
        parameter = nn.Parameter(torch.zeros(2))
        TrainingLoop(
            name="test",
            parameters={"p": parameter},
            optimizer=torch.optim.SGD([parameter], lr=1.0),
            loss=lambda step: [partial(torch.dot, parameter, batch) for batch in batches],  # its gradient is the batch
            total_steps=1,
            clip_grad_norm=clip,
            options=LoopOptions(show_progress=False),
        ).run()
        return -parameter.detach()

    batches = torch.tensor([[3.0, 0.0], [0.0, 8.0]])
    torch.testing.assert_close(one_step(batches, None), torch.tensor([3.0, 8.0]))
    torch.testing.assert_close(one_step(batches[:1], 1.0), torch.tensor([1.0, 0.0]))
    assert one_step(batches, 1.0).norm() <= 1 + 1e-5


def test_a_scaled_loss_trains_alike_and_an_overflow_is_named():
    torch.testing.assert_close(trained(loss_scale=1024.0), trained())
    with pytest.raises(ValueError, match="test: a gradient overflows at step 0; give dtype: bfloat16 or float32"):
        trained(loss_scale=1e39)


def test_each_part_is_differentiated_before_the_next_is_asked_for():
    parameter, seen, parts = nn.Parameter(torch.zeros(1)), [], []

    def made():
        found = (parameter * 2).sum()
        parts.append(weakref.ref(found))
        return found

    def loss(step):
        for part in range(3):
            assert all(earlier() is None for earlier in parts)  # and their graphs with them
            seen.append((part, parameter.grad is not None and parameter.grad.item()))
            yield made

    TrainingLoop(
        name="test",
        parameters={"p": parameter},
        optimizer=torch.optim.SGD([parameter], lr=1.0),
        loss=loss,
        total_steps=1,
        clip_grad_norm=None,
        options=LoopOptions(show_progress=False),
    ).run()
    assert seen == [(0, False), (1, 2.0), (2, 4.0)]


# -- when to save ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "least", "every"), [(0.5, 20, 20), (4, 20, 76), (0, 20, 20), (3, 1, 57), (3, 0, 1)])
def test_saves_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch, cost, least, every):
    from recbole_llm.training import loop as module

    clock, saves = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    loop, _ = make(tmp_path / "loop", steps=400, accumulate=1, save_every=least)
    sound = loop.loss

    def loss(step):
        yield from sound(step)
        clock.now += 1.0  # a step takes a second

    def save(_):
        saves.append(clock.now)
        clock.now += cost

    loop.loss = loss
    monkeypatch.setattr(loop, "_save", save)
    loop.run()
    gaps = [after - before - cost for before, after in zip(saves, saves[1:], strict=False)]
    assert saves[0] == max(least, 1) and all(every <= gap <= every + 1 for gap in gaps) and len(gaps) >= 3
    if least:
        assert cost * len(gaps) <= 0.05 * (saves[-1] - saves[0]) + 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_the_step_and_the_key_to_lower(bad):
    loop, _ = make(learning_rate_key="lora_learning_rate")
    before, sound = weights(loop), loop.loss
    loop.loss = lambda step: [weighted(bad, part) for part in sound(step)]
    with pytest.raises(ValueError, match="test: the loss is (nan|inf) at step 0; lower `lora_learning_rate`"):
        loop.run()
    assert_equal(weights(loop), before)


def test_a_validation_score_that_is_no_number_is_never_the_best():
    loop, _ = make(best_at=2)
    loop.validate = lambda: float("nan")
    with pytest.raises(ValueError, match="validation score is nan at step 2; lower `learning_rate`"):
        loop.run()


# -- which samples a step takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size", "steps"), [(12, 4, 3), (14, 4, 3), (5, 1, 5), (7, 7, 1), (3, 10, 1), (1, 1, 1)])
def test_an_epoch_takes_each_sample_once_but_for_a_rest_that_fills_no_batch(count, size, steps):
    epochs = Epochs(count, size, seed=3)
    assert epochs.steps == steps
    for epoch in range(4):
        batches = [epochs[epoch * steps + step].tolist() for step in range(steps)]
        assert {len(batch) for batch in batches} == {min(size, count)}
        taken = sum(batches, [])
        assert len(set(taken)) == len(taken) == steps * min(size, count) and set(taken) <= set(range(count))


def test_a_rest_is_left_out_of_one_epoch_and_not_of_all():
    epochs = Epochs(5, 2, seed=0)
    left = [({*range(5)} - {*epochs[2 * epoch].tolist(), *epochs[2 * epoch + 1].tolist()}).pop() for epoch in range(40)]
    assert {*left} == {0, 1, 2, 3, 4}


def test_every_epoch_has_an_order_of_its_own_drawn_from_the_seed_alone():
    def order(seed, epoch):
        return sum((Epochs(30, 10, seed)[3 * epoch + step].tolist() for step in range(3)), [])

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(found) for found in orders}) == 9
    torch.manual_seed(1)
    assert order(1, 1) == orders[4]


def test_a_step_is_the_same_whichever_were_asked_for_before_it():
    forward = [Epochs(9, 2, seed=5)[step].tolist() for step in range(20)]
    epochs = Epochs(9, 2, seed=5)
    backward = {step: epochs[step].tolist() for step in reversed(range(20))}
    assert forward == [backward[step] for step in range(20)]
