"""The lattice of weights that methods of merging measure, the same in every module.

It is a file of its own, since the scores at these points are a stage that no method's code invalidates
(:mod:`recbole_llm.model.merges.lattice_scores`).

Legend: K adapters.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def simplex_lattice(count: int, most: int) -> list[Tensor]:
    """The finest regular lattice ``{i / n}`` on the simplex of ``count`` weights with at most ``most`` points.

    It always contains the corners, which are the single adapters, even if ``count > most``.
    """
    n = 1
    while count > 1 and math.comb(n + count, count - 1) <= most:
        n += 1
    cuts = itertools.combinations(range(n + count - 1), count - 1)
    parts = ([b - a - 1 for a, b in itertools.pairwise((-1, *cut, n + count - 1))] for cut in cuts)
    return [torch.tensor(part) / n for part in parts]


def control_points(count: int) -> list[tuple[str, Tensor]]:
    """The uniform mixture, then each single adapter: phases and weights ``[K]``."""
    return [("uniform", torch.full((count,), 1 / count)), *(("single", corner) for corner in torch.eye(count))]


def points_of_lattice(count: int, most: int) -> list[tuple[str, Tensor]]:
    """The controls, then the rest of the lattice of at most ``most`` points: phases and weights ``[K]``."""
    points = control_points(count)
    for point in simplex_lattice(count, most):
        if not any(torch.equal(point, known) for _, known in points):
            points.append(("grid", point))
    return points
