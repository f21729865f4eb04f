"""Methods that choose weights by labelled validation users, or calibrate by them; none reads the test.

All of them start from the scores at the points of one lattice, which a run measures once for all (``lattice_scores``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.merging.coefficients import (
    MergeProblem,
    MergeResult,
    best_point,
    descend,
    lattice_points,
    learning_rates,
    measured_point,
)
from recbole_llm.merging.lattice import Labelled, Lattice, least


def grid(problem: MergeProblem) -> MergeResult:
    """The lattice point of the best validation metric; the weights are the same in every module.

    Settings: ``points`` (11) of the lattice at most.
    """
    found = _lattice(problem, "grid")
    return MergeResult(found.weights[least(-found.values.double().mean(1), found.weights)], _trace(found))


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


def likelihood(problem: MergeProblem) -> MergeResult:
    """The weights of the largest likelihood of the validation targets among their candidates.

    Adam on fp32 logits (softmax over the adapters) minimizes the mean cross-entropy, from the best point of the lattice; the
    result is the least of all measured points. LoraHub (arXiv 2307.13269) learns weights from a few labelled examples, too, but
    without gradients. With ``granularity: module`` there is one vector of logits per module, which is much to learn from the
    labels of few users; ``shrinkage`` draws the weights to the uniform mixture: it adds a squared distance, which is 0 there and
    ``shrinkage`` nats at a single adapter.

    Settings: ``points`` (11) of the lattice at most, ``steps`` (20) of Adam, ``lr`` (0.1) or several, ``shrinkage`` (0).
    """
    labelled, found = _needed(problem, "likelihood"), _lattice(problem, "likelihood")
    losses, path, chosen = _likeliest(problem, labelled, found, range(len(labelled.slots)))
    return MergeResult(chosen, [*_trace(found, loss=losses), *path])


def auto(problem: MergeProblem) -> MergeResult:
    """The better single adapter, unless a mixture is better on users that did not choose it.

    The labelled validation users are split in two halves. On the first, the best mean metric chooses among the lattice (each
    single adapter and the uniform mixture included) and the :func:`likelihood` weights that this half gives. On the second, the
    chosen point is compared with the single adapter that is better on all users; it is taken if its mean metric is higher by more
    than one standard error of the paired difference (the one-standard-error rule: Breiman et al., Classification and Regression
    Trees, 1984, section 3.4.3). So no mixture is its own judge, and in doubt a single adapter has all weight.

    Settings: as :func:`likelihood`. The last point of the trace, ``confirm``, has the comparison.

    Raises:
        ValueError: fewer than four labelled users.
    """
    labelled, found = _needed(problem, "auto"), _lattice(problem, "auto")
    users = range(len(labelled.slots))
    if len(users) < 4:
        raise ValueError(
            f"merge: auto splits the labelled validation users in halves, but there are {len(users)}; give 4 or more "
            "(valid_users, eval_users)"
        )
    choose, confirm = users[::2], users[1::2]  # their order is drawn
    losses, path, likeliest = _likeliest(problem, labelled, found, choose)
    weights = torch.cat([found.weights, likeliest[None]])  # [P + 1, ...]
    values = torch.cat([found.values, labelled.values(labelled.scores(likeliest))[None]]).double()  # [P + 1, N]
    place = least(-values[:, choose].mean(1), weights)
    single = max(found.singles, key=lambda point: float(values[point].mean()))
    gain = (values[place] - values[single])[confirm]
    difference, error = float(gain.mean()), float(gain.std() / len(gain) ** 0.5)
    taken = difference > error
    measured = measured_point("confirm", weights[place], difference=difference, standard_error=error)
    verdict = {**measured, "better_single": problem.names[found.singles.index(single)], "taken": taken}
    return MergeResult(weights[place if taken else single], [*_trace(found, loss=losses), *path, verdict])


def _likeliest(
    problem: MergeProblem, labelled: Labelled, found: Lattice, users: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]], Tensor]:
    """The loss ``[P]`` of the lattice for some users, the points of Adam, and the weights of the least loss."""
    count, shrinkage = len(problem.names), float(problem.setting("shrinkage", 0.0))
    cross_entropy = labelled.cross_entropy(users)

    def penalty(weights: Tensor) -> Tensor:
        distance = (weights - 1 / count).square().sum(-1)  # [] or [M]; 1 - 1 / K at a single adapter
        return shrinkage * distance.mean() / max(1 - 1 / count, 0.5)

    def loss(weights: Tensor) -> Tensor:
        return cross_entropy(weights) + penalty(weights)

    losses = found.cross_entropy().double()[:, users].mean(1) + torch.stack([penalty(w) for w in found.weights])  # [P]
    start, path = found.weights[least(losses, found.weights)], []
    if count > 1:
        for rate in learning_rates(problem):
            path += descend(problem, loss, start, rate, "loss")[0]
    if not path or min(point["loss"] for point in path) >= float(losses.min()):
        return losses, path, start
    return losses, path, best_point(path, "loss")


def _needed(problem: MergeProblem, method: str) -> Labelled:
    if problem.labelled is None:
        raise ValueError(f"merge: {method} needs labelled validation users; without them use 'entropy' or 'uniform'")
    return problem.labelled


def _lattice(problem: MergeProblem, method: str) -> Lattice:
    return Lattice.measured(_needed(problem, method), lattice_points(problem), problem.lattice_scores)


def _least(found: Lattice, what: str, values: Tensor, settings: dict[str, Any] | None = None) -> MergeResult:
    """The point of the least mean of values [P, N]."""
    means = values.double().mean(1)  # [P]
    return MergeResult(found.weights[least(means, found.weights)], _trace(found, **{what: means}), settings=settings or {})


def _trace(found: Lattice, **means: Tensor) -> list[dict[str, Any]]:
    """The points with their validation score, and means [P] by name."""
    measured = {"score": found.values.double().mean(1), **means}
    points = enumerate(zip(found.phases, found.weights, strict=True))
    return [measured_point(phase, w, **{n: float(v[i]) for n, v in measured.items()}) for i, (phase, w) in points]
