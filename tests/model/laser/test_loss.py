"""What is frozen and what is trained, and the published loss."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_llm.model.laser import training as laser_training
from recbole_llm.model.laser.m_former import WarmUp
from recbole_llm.model.parts import histories_of
from tests.model.laser.conftest import (
    QUICK,
    Made,
    batch_loss,
    close,
    equal,
    loss_of,
    stage_tensors,
    state,
    valid_score,
)

# -- frozen and trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"warmup_epochs": 1}])
def test_the_lm_is_byte_for_byte_the_same_after_all_phases(trained: Any, changes: dict[str, Any]) -> None:
    made = trained(**changes)
    assert equal(state(made.lm), made.lm_before)
    names = {name.split(".")[0] for name, parameter in made.model.towers.named_parameters() if parameter.requires_grad}
    assert names == {"user"} and not any(p.requires_grad for p in made.model.cf.model.parameters())
    made.model.train()
    assert not made.lm.training and not made.model.towers.item.training and not made.model.cf.model.training
    assert made.model.towers.user.training
    made.model.eval()


def test_what_a_later_phase_trains_again_is_counted_once(trained: Any) -> None:
    """The user tower, and the two heads of the warm-up; the item tower is a copy."""
    plain, warm = (trained(**changes) for changes in ({}, {"warmup_epochs": 1}))
    before = plain.trainer.cache.trained(plain.model.cf.stage)
    tower = sum(parameter.numel() for parameter in plain.model.towers.user.parameters())
    assert plain.trainer.trained_parameters == before + tower
    config = warm.model.reader.config.former.hidden_size, warm.model.reader.width
    heads = sum(parameter.numel() for parameter in WarmUp(*config).parameters())
    assert warm.trainer.trained_parameters == before + tower + heads


def test_the_warm_up_is_where_phase_1_begins(trained: Any) -> None:
    warm = trained(warmup_epochs=1)
    assert [*warm.trainer.cache.seconds] == ["cf-SASRec", "m-former", "phase-1", "phase-2"]
    begun, fresh = (trained(warmup_epochs=e, phase1_epochs=0, phase2_epochs=0).model.towers.user for e in (1, 0))
    assert equal(state(begun), stage_tensors(warm, "m-former")["user_tower"])
    changed = {name for name, tensor in state(fresh).items() if not torch.equal(tensor, state(begun)[name])}
    assert changed and not any(re.match(r"m_former\.project|suffix", name) for name in changed)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.01, 5.0])
def test_the_loss_is_the_papers(made: Made, weight: float) -> None:
    """- log exp(cos / tau) / sum over the catalogue of exp(cos / tau), and lambda K sum f P."""
    model, targets = made.model, made.batch["item_id"].tolist()
    histories = histories_of(model, made.batch)
    found = batch_loss(made, load_balance_weight=weight)
    expected, chosen, probabilities = 0.0, [], []
    with torch.no_grad():
        items = model.encode_items()[1:]
        for history, target in zip(histories, targets, strict=True):
            user = model.encode_histories([history])[0]
            cosines = [torch.cosine_similarity(user, item, dim=0) for item in items]
            exponentials = torch.stack(cosines).div(0.05).exp()
            expected -= float((exponentials[target - 1] / exponentials.sum()).log()) / len(targets)
            states, _ = model.cf.sequence_states([history])
            for p in model.towers.user.m_former.router(states[0]).softmax(-1):
                probabilities.append(p)
                chosen.append(int(p.argmax()))
    mean = torch.stack(probabilities).mean(0)
    balance = 3 * sum(chosen.count(expert) / len(chosen) * float(mean[expert]) for expert in range(3))
    assert len(histories) == 9 and sum(map(len, histories)) == len(chosen)
    assert found.item() == pytest.approx(expected + weight * balance, abs=1e-3)


def test_new_items_are_no_rivals_of_a_target(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in training nor in validation."""
    made = trained(new_items=0.2, **QUICK)
    matrix, new = made.model.item_matrix, sorted(made.model.parts.histories.scenario.new)
    loss, score = batch_loss(made), valid_score(made.model)
    for items, same in ((new, True), ([item for item in range(1, len(matrix)) if item not in new], False)):
        other = matrix.clone()
        other[items] = -other[items]
        monkeypatch.setattr(made.model.towers, "item_matrix", other)
        assert torch.isclose(batch_loss(made), loss) == same
        monkeypatch.setattr(made.model, "item_matrix", other)
        assert (valid_score(made.model) == score) == same


def test_no_gradient_goes_into_the_item_matrix_the_item_tower_or_the_lm(trained: Any) -> None:
    made = trained(**QUICK)
    towers, matrix = made.model.towers, made.model.item_matrix
    for cached in (True, False):  # also where the loss is what encodes it
        towers.item_matrix = matrix if cached else None
        towers.zero_grad()
        batch_loss(made).backward()
        assert not towers.item_matrix.requires_grad and towers.item_matrix.grad is None
        close(towers.item_matrix, matrix)
        reached = {name.split(".")[0] for name, parameter in towers.named_parameters() if parameter.grad is not None}
        assert reached == {"user"} and all(parameter.grad is None for parameter in made.lm.parameters())
        m_former = towers.user.m_former
        for parameter in (towers.user.suffix, m_former.router.weight, m_former.experts, m_former.project.weight):
            assert parameter.grad.any()
    towers.item_matrix = matrix


@torch.no_grad()
@pytest.mark.parametrize("key", ["null_share", "single_share"])
def test_missing_states_and_single_items_are_drawn_in_the_loss_alone(trained: Any, key: str) -> None:
    made = trained(**QUICK, m_former_dropout=0.0, **{key: 0.6})
    model, losses = made.model, []
    for share in (0.0, 0.6):
        torch.manual_seed(0)
        losses.append(batch_loss(made, **{key: share}).item())
    assert abs(losses[1] - losses[0]) > 1e-4
    histories = histories_of(model, made.batch)
    assert torch.equal(model.train().encode_histories(histories), model.eval().encode_histories(histories))
    assert torch.equal(model.encode_histories(histories), model.encode_histories(histories))


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_null_token_is_trained_on_the_share_of_the_histories_that_lose_their_states(
    trained: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    model, routed = trained(**QUICK).model, []
    balance = laser_training.load_balance
    monkeypatch.setattr(laser_training, "load_balance", lambda part, batch: (routed.append(batch), balance(part, batch))[1])
    torch.manual_seed(0)
    model.towers.zero_grad(set_to_none=True)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, null_share=share)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, null_share=share)[0].backward()
    reached = bool(model.towers.user.m_former.null.grad.abs().max() > 0)
    model.towers.zero_grad(set_to_none=True)
    first, second = (routing.seen.sum(1) for routing in routed)  # 3 states, or the null token alone
    assert {*first.tolist(), *second.tolist()} == ({1, 3} if share else {3})
    assert (10 < int((second == 1).sum()) < 30 and not torch.equal(first, second)) == reached == bool(share)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_parts_add_up_to_the_loss_of_the_batch_and_its_gradient(made: Made, weight: float) -> None:
    """With the load balance, which is no sum over users: the experts' shares are those of the batch in every part."""
    histories, targets = [[3], [3, 1, 4], [7, 2], [5, 6, 8, 9, 2], [1, 2]], [15, 3, 8, 12, 9]
    parameters = [parameter for parameter in made.model.towers.user.parameters() if parameter.requires_grad]

    def gradient(tokens: int) -> tuple[int, Tensor, list[Tensor]]:
        parts = loss_of(made.model.eval(), histories, targets, tokens, load_balance_weight=weight)
        total = torch.stack(parts).sum()
        return len(parts), total, [*torch.autograd.grad(total, parameters, materialize_grads=True)]

    (one, whole, expected), (many, summed, found) = gradient(10**6), gradient(1)
    assert one == 1 and many == 5
    close(summed, whole, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert any(part.abs().max() > 1e-3 for part in expected)


def test_a_single_item_is_the_last_of_its_history(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = trained(**QUICK).model, []
    embed = model.reader.embed
    monkeypatch.setattr(model.reader, "embed", lambda tower, rows, *rest: (read.extend(rows), embed(tower, rows, *rest))[1])
    torch.manual_seed(0)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, single_share=0.5)
    assert {*map(tuple, read)} == {(3, 1, 4), (4,)} and 10 < read.count([4]) < 30
