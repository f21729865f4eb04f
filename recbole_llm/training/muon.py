"""Muon for weight matrices and AdamW for other parameters in one optimizer.

Muon (Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal matrix, so that all directions of a layer learn at the same rate. A small LM needs far fewer tokens.
Embeddings, norms and biases are not maps between hidden states and use AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic by Jordan et al.


class MuonAdamW(torch.optim.Optimizer):
    """Muon on ``matrices``, AdamW on ``others``; ``param_groups`` has the learning rate and weight decay of each.

    Args:
        matrices: two-dimensional weights of linear layers.
        others: embeddings, norms, biases, an output head.
        matrix_lr: learning rate of Muon, about the relative change of a matrix in one step.
        lr: learning rate of AdamW.
        momentum: Nesterov momentum of Muon.
        betas: of AdamW.
        weight_decay: decoupled weight decay of the matrices.

    Raises:
        ValueError: a matrix has not two dimensions.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        matrix_lr: float,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.1,
    ):
        matrices = list(matrices)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": matrix_lr, "weight_decay": weight_decay, "muon": True},
            {"params": list(others), "lr": lr, "weight_decay": 0.0, "muon": False},
        ]
        flat = [tuple(matrix.shape) for matrix in matrices if matrix.dim() != 2]
        if flat:
            raise ValueError(f"matrices: Muon takes two-dimensional weights only, not {flat}; give those as others")
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            update(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _muon(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        for weight in matrices:
            state = self.state[weight]
            momentum = state["momentum"] if state else state.setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            ahead = weight.grad.lerp(momentum, group["momentum"])  # type: ignore[union-attr]
            rows, columns = weight.shape
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(orthogonal(ahead), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        beta1, beta2 = group["betas"]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix [m, n], by Newton-Schulz iteration.

    The singular vectors do not change, the singular values become .7 .. 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if tall else matrix  # [s, l], s <= l
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # [s, s]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
