"""Methods that choose weights by labelled validation users, or calibrate by them; none reads the test.

``grid``, which maximizes the validation metric itself, is in :mod:`recbole_llm.merging.coefficients`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recbole_llm.merging.coefficients import MergeProblem, MergeResult, lattice_points, measured_point
from recbole_llm.merging.lattice import Labelled, Lattice, least


def calibrated_entropy(problem: MergeProblem) -> MergeResult:
    """The lattice point of least candidate entropy, once the scores are divided by the adapters' own temperatures.

    Entropy compares how sure the adapters are (AdaMerging, arXiv 2310.02575; RecCocktail, arXiv 2502.08271). One temperature for
    each, fitted on labelled validation users (Guo et al., arXiv 1706.04599), makes each as sure as it is right on average. See
    :meth:`~recbole_llm.merging.lattice.Lattice.calibrated_entropy` for mixtures.

    Settings: ``points`` (11) of the lattice at most.
    """
    found = _lattice(problem, "calibrated_entropy")
    temperatures = dict(zip(problem.names, found.temperatures(), strict=True))
    return _least(found, "calibrated_entropy", found.calibrated_entropy(), {"temperatures": temperatures})


def agreement(problem: MergeProblem) -> MergeResult:
    """The lattice point whose candidate probabilities diverge least from those of the single adapters; no label is read.

    It minimizes the mean of ``KL(p_i || p)``: the mixture that an ensemble of the adapters would be distilled into.

    Settings: ``points`` (11) of the lattice at most.
    """
    found = _lattice(problem, "agreement")
    return _least(found, "disagreement", found.disagreement())


def _needed(problem: MergeProblem, method: str) -> Labelled:
    if problem.labelled is None:
        raise ValueError(f"merge: {method} needs labelled validation users; without them use 'entropy' or 'uniform'")
    return problem.labelled


def _lattice(problem: MergeProblem, method: str) -> Lattice:
    return Lattice.measured(_needed(problem, method), lattice_points(problem))


def _least(found: Lattice, what: str, values: Tensor, settings: dict[str, Any] | None = None) -> MergeResult:
    """The point of the least mean of values [P, N]."""
    means = values.double().mean(1)  # [P]
    return MergeResult(found.weights[least(means, found.weights)], _trace(found, **{what: means}), settings=settings or {})


def _trace(found: Lattice, **means: Tensor) -> list[dict[str, Any]]:
    """The points with their validation score, and means [P] by name."""
    measured = {"score": found.values.double().mean(1), **means}
    points = enumerate(zip(found.phases, found.weights, strict=True))
    return [measured_point(phase, w, **{n: float(v[i]) for n, v in measured.items()}) for i, (phase, w) in points]
