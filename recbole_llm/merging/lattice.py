"""The scores of labelled users at the points of a lattice of weights, and quantities by which a point may be chosen.

One pass over the candidates of a point gives all of them. Each is ``[P, N]``, a value for each point and user; less is better.

Legend: P points, K adapters, M modules, N users, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recbole_llm.merging.calibration import cross_entropies, temperature
from recbole_llm.merging.objectives import entropies


class Labelled(Protocol):
    """Validation users with their targets, all of which are among the candidates.

    Attributes:
        slots: of the targets, ``[N]``.
    """

    slots: Tensor

    def scores(self, weights: Tensor) -> Tensor:
        """Scores ``[N, C]`` at weights ``[K]`` or ``[M, K]``, without gradients; finite."""
        ...

    def values(self, scores: Tensor) -> Tensor:
        """The validation metric ``[N]`` of each user; bigger is better."""
        ...

    def cross_entropy(self, users: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Weights -> mean cross-entropy (nats) of the targets of these users; a differentiable scalar."""
        ...


@dataclass(frozen=True)
class Lattice:
    """Labelled users at P points.

    Attributes:
        phases: of the points: ``uniform``, ``single`` (K points, in the order of the adapters), ``grid``.
        weights: of the points, ``[P, K]`` or ``[P, M, K]``.
        scores: ``[P, N, C]``.
        slots: of the targets, ``[N]``.
        values: the validation metric, ``[P, N]``.
    """

    phases: Sequence[str]
    weights: Tensor
    scores: Tensor
    slots: Tensor
    values: Tensor

    @classmethod
    def measured(cls, labelled: Labelled, points: Sequence[tuple[str, Tensor]], scores: Tensor | None = None) -> Lattice:
        """The lattice of phases and weights ``[K]`` or ``[M, K]``; scores ``[P, N, C]`` that are known are not measured."""
        if scores is None:
            scores = torch.stack([labelled.scores(weights) for _, weights in points])
        values = torch.stack([labelled.values(found) for found in scores])
        return cls([phase for phase, _ in points], torch.stack([w for _, w in points]), scores, labelled.slots, values)

    @property
    def singles(self) -> list[int]:
        """The points of the single adapters, ``[K]``."""
        return [place for place, phase in enumerate(self.phases) if phase == "single"]

    @property
    def means(self) -> Tensor:
        """Weights ``[P, K]``; those by module are averaged."""
        return self.weights.flatten(1, -2).mean(1) if self.weights.dim() == 3 else self.weights

    def entropy(self) -> Tensor:
        """Entropy over the candidates (nats), ``[P, N]``."""
        return entropies(self.scores)

    def temperatures(self) -> list[float]:
        """The temperature of each adapter, ``[K]``, fitted on all users' labels."""
        return [temperature(self.scores[place], self.slots) for place in self.singles]

    def calibrated_entropy(self) -> Tensor:
        """Entropy over the candidates (nats), ``[P, N]``, of scores divided by ``T``, where ``log T = sum_i w_i log T_i``.

        ``T_i`` is the temperature of adapter i alone. So each adapter is compared as sure as it is right.
        """
        log_t = self.means.double() @ torch.tensor(self.temperatures(), dtype=torch.double).log()  # [P]
        return entropies(self.scores / log_t.exp()[:, None, None])

    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the targets among the candidates (nats), ``[P, N]``."""
        return torch.stack([cross_entropies(found, self.slots) for found in self.scores])

    def disagreement(self) -> Tensor:
        """``[P, N]`` (nats): mean over the adapters of ``KL(p_i || p)``, of the mixture ``p`` from each single adapter."""
        log_p = torch.log_softmax(self.scores.double(), dim=-1)  # [P, N, C]
        own = log_p[self.singles]  # [K, N, C]
        return torch.stack([(own.exp() * (own - found)).sum(-1).mean(0) for found in log_p])


def least(values: Tensor, weights: Tensor) -> int:
    """The point of the least of values ``[P]``; ties go to the most even of weights ``[P, ...]``."""
    unevenness = weights.flatten(1).square().sum(1)  # [P]
    return min(range(len(values)), key=lambda point: (float(values[point]), float(unevenness[point])))
