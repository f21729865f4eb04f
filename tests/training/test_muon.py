"""MuonAdamW against torch's AdamW, against singular value decomposition, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recbole_llm.training.muon import MuonAdamW, orthogonal
from recbole_llm.training.saving import optimizer_tensors, restore_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))


def optimizer_of(model: nn.Sequential) -> MuonAdamW:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("0.")]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return MuonAdamW(matrices, others, matrix_lr=0.1, lr=0.05)


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    tokens = torch.arange(7)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 3 + 1) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(5, 5), (4, 12), (12, 4)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ orthogonal(matrix) @ right.mT  # diagonal in the singular basis
    values = core.diagonal()
    assert (core - values.diag()).abs().max() < 1e-4
    assert values.min() > 0.6 and values.max() < 1.3


def test_orthogonal_of_zero_is_finite() -> None:
    assert orthogonal(torch.zeros(3, 4)).abs().max() == 0


def test_others_move_as_under_torch_adamw() -> None:
    ours, theirs = network(), network()
    train(ours, MuonAdamW([], ours.parameters(), matrix_lr=0.1, lr=0.01), 5)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0), 5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_matrices_move_as_under_torch_muon() -> None:
    ours, theirs = nn.Parameter(torch.ones(8, 3)), nn.Parameter(torch.ones(8, 3))
    optimizers = (
        MuonAdamW([ours], [], matrix_lr=0.02, lr=0.0, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1),
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        gradient = torch.randn(8, 3, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # torch iterates in bfloat16


def test_learns_and_goes_on_bit_equal_from_its_saved_state() -> None:
    whole, first, second = network(), network(), network()
    losses = train(whole, optimizer_of(whole), 30)
    assert losses[-1] < 0.3 * losses[0]
    optimizer = optimizer_of(first)
    train(first, optimizer, 12)
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    restore_optimizer(resumed, optimizer_tensors(optimizer))
    assert train(second, resumed, 18) == losses[12:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_schedule_reaches_both_groups() -> None:
    optimizer = optimizer_of(network())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [0.05, 0.025]


def test_parameters_without_gradient_stay() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer_of(model).step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_vectors_are_refused_as_matrices() -> None:
    with pytest.raises(ValueError, match=r"two-dimensional weights only, not \[\(4,\)\]"):
        MuonAdamW([nn.Parameter(torch.ones(4))], [], matrix_lr=0.1, lr=0.1)
