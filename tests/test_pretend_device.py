"""The pretend device refuses what PyTorch refuses between devices, and allows what it allows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from pretend_device import CPU, PRETEND, pretend_device
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with pretend_device() as device:
        yield device


def on_device(*shape: int) -> Tensor:
    return torch.ones(*shape, device=PRETEND)


REFUSED: dict[str, Callable[[], object]] = {
    "two tensors": lambda: on_device(3) + torch.ones(3),
    "a CPU scalar that is written to": lambda: torch.zeros(()).add_(on_device(3).sum()),
    "a CPU tensor with indices of a device": lambda: torch.ones(3)[torch.tensor([0], device=PRETEND)],
    "concatenation": lambda: torch.cat([on_device(3), torch.ones(3)]),
    "a CPU scalar in a concatenation": lambda: torch.stack([on_device(1)[0], torch.tensor(1.0)]),
    "numpy": lambda: on_device(3).numpy(),
    "a module": lambda: nn.Linear(3, 3).to(PRETEND)(torch.ones(3)),
    "CPU ids of an embedding": lambda: nn.Embedding(4, 3).to(PRETEND)(torch.tensor([1])),
    "a CPU condition": lambda: torch.where(torch.ones(3) > 0, on_device(3), on_device(3)),
    "CPU places to gather": lambda: on_device(3).gather(0, torch.tensor([1])),
    "CPU values to put": lambda: on_device(3).index_put((torch.tensor([1, 2]),), torch.ones(2)),
    "a CPU generator": lambda: torch.rand(3, device=PRETEND, generator=torch.Generator()),
    "two accelerators": lambda: on_device(3) + torch.ones(3, device="cuda:1"),
}

ALLOWED: dict[str, tuple[Callable[[], Tensor], torch.device]] = {
    "a CPU scalar": (lambda: on_device(3) + torch.tensor(2.0), PRETEND),
    "a CPU scalar in place": (lambda: on_device(3).mul_(torch.tensor(2.0)), PRETEND),
    "CPU indices": (lambda: on_device(3)[torch.tensor([0])], PRETEND),
    "copying to the CPU": (lambda: torch.zeros(3).copy_(on_device(3)), CPU),
    "moving": (lambda: torch.as_tensor(torch.ones(3), device=PRETEND), PRETEND),
    "to another tensor": (lambda: torch.ones(3).to(on_device(3)), PRETEND),
    "to the CPU": (lambda: on_device(3).cpu(), CPU),
    "a factory of a tensor": (lambda: on_device(3).new_zeros(2), PRETEND),
    "a factory like a tensor": (lambda: torch.zeros_like(on_device(3)), PRETEND),
    "a factory like a tensor, elsewhere": (lambda: torch.zeros_like(on_device(3), device="cpu"), CPU),
    "a view": (lambda: on_device(3, 2).T[0], PRETEND),
    "a sparse product": (lambda: torch.eye(3).to_sparse().to(PRETEND) @ on_device(3, 2), PRETEND),
    "a copy": (lambda: copy.deepcopy(nn.Linear(3, 3).to(PRETEND)).weight, PRETEND),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|numpy|generator"):
        REFUSED[case]()


@pytest.mark.parametrize("case", ALLOWED)
def test_allowed(case: str) -> None:
    make, device = ALLOWED[case]
    assert make().device == device


def test_gradients_are_where_their_tensors_are() -> None:
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    layer = nn.Linear(3, 3).to(PRETEND)
    first, second = weights.unbind()
    (layer(on_device(3)) * first + on_device(3) * second).sum().backward()
    assert weights.grad is not None and layer.weight.grad is not None
    assert (weights.grad.device, layer.weight.grad.device) == (CPU, PRETEND)
    torch.optim.AdamW([weights, *layer.parameters()]).step()
    assert weights.grad.tolist() == [pytest.approx(layer(on_device(3)).sum().item(), abs=0.1), 3.0]


def test_values_are_computed_and_a_move_is_a_copy() -> None:
    host = torch.tensor([1.0, 2.0])
    moved = host.to(PRETEND)
    moved += 1
    assert host.tolist() == [1, 2] and moved.tolist() == [2, 3] and moved.cpu().numpy().sum() == 5
    assert moved.is_cuda and moved.get_device() == 0 and host.get_device() == -1


def test_nothing_is_left_of_it() -> None:
    with pretend_device():
        pass
    assert torch.ones(3).to("cpu").device == CPU
