"""Coefficients of a merge: uniform, fixed, or of minimum entropy (RecCocktail).

Each method is a function from a :class:`MergeProblem` to a :class:`MergeResult`. A result contains every measured point,
always including the uniform mixture and each single adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recbole_llm.llm.adapter_folders import Adapter
from recbole_llm.merging.lattice import Labelled
from recbole_llm.merging.points import control_points, points_of_lattice


@dataclass(frozen=True)
class MergeProblem:
    """The input of a merge method.

    Args:
        names: K adapters.
        modules: M adapted modules; if empty, the merge stage fills in those of the adapters.
        granularity: ``global`` (weights ``[K]``) or ``module`` (weights ``[M, K]``).
        objective: weights, ``[K]`` or ``[M, K]`` -> mean entropy on unlabelled prompts, a differentiable scalar.
        valid_score: weights -> a metric on labelled validation data, bigger is better; ``entropy`` compares learning rates by it.
        labelled: labelled validation users; the methods of :mod:`recbole_llm.merging.rules` use them.
        lattice_scores: their scores ``[P, N, C]`` at :func:`lattice_points`, which are the same for all granularities; None: a
            method that needs them measures them.
        settings: the user's settings of the method; see :meth:`setting`.
        adapters: the K adapters in the order of ``names``; the merge stage fills them in.

    Raises:
        ValueError: unknown granularity, no name, or a name that occurs twice.
    """

    names: list[str]
    modules: list[str]
    granularity: str = "global"
    objective: Callable[[Tensor], Tensor] | None = None
    valid_score: Callable[[Tensor], float] | None = None
    labelled: Labelled | None = None
    lattice_scores: Tensor | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.granularity not in ("global", "module"):
            raise ValueError(f"merge_granularity must be 'global' or 'module', got {self.granularity!r}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"merge: the adapters need different names, got {self.names}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights: ``[K]`` or ``[M, K]``."""
        return (len(self.names),) if self.granularity == "global" else (len(self.modules), len(self.names))

    def setting(self, key: str, default: Any) -> Any:
        """A setting, or the method's default if the key is absent or None."""
        value = self.settings.get(key)
        return default if value is None else value

    def expand(self, point: Tensor) -> Tensor:
        """A global point ``[K]`` in the shape of the problem."""
        return point.expand(self.shape).clone()

    def by_name(self, weights: Tensor) -> dict[str, Tensor | Mapping[str, Tensor]]:
        """Weights ``[K]`` or ``[M, K]`` as coefficients of an :class:`recbole_llm.llm.lora.AdapterView`.

        Returns:
            adapter -> scalar, or adapter -> module -> scalar.
        """
        if weights.dim() == 1:
            return dict(zip(self.names, weights.unbind(), strict=True))
        columns = weights.unbind(1)
        return {n: dict(zip(self.modules, c.unbind(), strict=True)) for n, c in zip(self.names, columns, strict=True)}


@dataclass(frozen=True)
class MergeResult:
    """The chosen weights, ``[K]`` or ``[M, K]``, and the measured points.

    A point has a ``phase`` (uniform, single, grid, adam, or the method's name), ``weights`` and, if measured,
    ``entropy``, ``score`` and what else the method compares.

    Args:
        merged: the merged adapter, from a method that is not a weighted sum; None: the stage sums by ``weights``.
        derived: the method computes the weights from the adapters, so they may lie outside [0, 1].
        settings: the settings that the method used, defaults included, for the record.
    """

    weights: Tensor
    trace: list[dict[str, Any]]
    merged: Adapter | None = None
    derived: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def uniform(problem: MergeProblem) -> MergeResult:
    """``1 / K`` each (WeaveRec's published weights)."""
    trace = controls(problem)
    return MergeResult(torch.tensor(trace[0]["weights"]), trace)


def fixed(problem: MergeProblem) -> MergeResult:
    """The user's ``weights``: a list in the order of the adapters, or adapter -> weight."""
    weights = problem.expand(given_weights(problem))
    return MergeResult(weights, controls(problem, ("fixed", weights)))


def entropy(problem: MergeProblem) -> MergeResult:
    """Minimizes the mean entropy on unlabelled prompts by Adam on fp32 logits (softmax over the adapters).

    With ``granularity: module`` there is one vector of logits per module.

    ``start: lattice``: a lattice without gradients comes first, since the entropy may have several local minima; Adam starts
    from its best point, and the result is the minimum over all measured points. So its entropy is at most that of the uniform
    mixture and of each single adapter.

    ``start: uniform``: the published procedure (RecCocktail, section 3.4). Adam starts from the uniform mixture, and the result
    is where it ends. Of several learning rates, the one with the best labelled validation score is used; the authors' code
    compares them on the test file.

    Settings: ``start`` (lattice), ``points`` (11) of the lattice at most, ``steps`` (20) of Adam, ``lr`` (0.1) or several.
    """
    if problem.objective is None:
        raise ValueError("merge: entropy needs an objective; use 'uniform' or 'fixed' without prompts")
    if problem.setting("start", "lattice") == "uniform":
        return _published(problem, problem.objective)
    trace = [_measure(problem, *point) for point in lattice_points(problem)]
    if len(problem.names) > 1:
        start = best_point(trace, "entropy")
        for rate in learning_rates(problem):
            trace += descend(problem, problem.objective, start, rate)[0]
    return MergeResult(best_point(trace, "entropy"), trace)


def _published(problem: MergeProblem, objective: Callable[[Tensor], Tensor]) -> MergeResult:
    """Adam from the uniform mixture, once for each learning rate."""
    trace, ends, rates = controls(problem), [], learning_rates(problem)
    if len(rates) > 1 and problem.valid_score is None:
        raise ValueError(f"merge_learning_rate: {rates} need a labelled validation score to choose by; give one")
    for rate in rates:
        path, end = descend(problem, objective, torch.tensor(trace[0]["weights"]), rate)
        ends.append({**_measure(problem, "end", end, scored=len(rates) > 1), "learning_rate": rate})
        trace += [*path, ends[-1]]
    chosen = best_point(ends, "score", largest=True) if len(rates) > 1 else torch.tensor(ends[0]["weights"])
    return MergeResult(chosen, trace)


def learning_rates(problem: MergeProblem) -> list[float]:
    """The learning rates of Adam, of which there may be several."""
    given = problem.setting("lr", 0.1)
    return [float(rate) for rate in (given if isinstance(given, list | tuple) else [given])]


def given_weights(problem: MergeProblem, default: float | None = None) -> Tensor:
    """The user's ``weights``, a list or adapter -> weight, as ``[K]``; if there are none, ``default`` for each adapter.

    Raises:
        ValueError: other names or another number than the problem's, no weights and no ``default``, or see :func:`check_weights`.
    """
    given = problem.setting("weights", None if default is None else [default] * len(problem.names))
    if isinstance(given, Mapping):
        if set(given) != set(problem.names):
            raise ValueError(f"merge_weights name {sorted(given)}, but the adapters are {sorted(problem.names)}")
        given = [given[name] for name in problem.names]
    if given is None or len(given) != len(problem.names):
        raise ValueError(f"merge_weights: give one weight for each of {problem.names}, got {given}")
    weights = torch.tensor([float(weight) for weight in given])
    check_weights(problem, weights)
    return weights


def controls(problem: MergeProblem, *more: tuple[str, Tensor]) -> list[dict[str, Any]]:
    """Measured points: the uniform mixture, each single adapter, then ``more`` phases and weights."""
    return [_measure(problem, *point) for point in (*single_points(problem), *more)]


def check_weights(problem: MergeProblem, weights: Tensor, bounded: bool = True) -> None:
    """Check the shape and the values of weights.

    Args:
        bounded: False allows weights outside [0, 1], as does the setting ``extrapolate``.

    Raises:
        ValueError: weights that are neither ``[K]`` nor ``[M, K]``, not finite, or outside [0, 1].
    """
    shapes = (len(problem.names),), (len(problem.modules), len(problem.names))
    if tuple(weights.shape) not in shapes:
        one, each = map(list, shapes)
        raise ValueError(f"merge weights must have shape {one} or, by module, {each}, got {list(weights.shape)}")
    if not torch.isfinite(weights).all():
        raise ValueError(f"merge weights must be finite, got {weights.tolist()}")
    if bounded and not problem.settings.get("extrapolate") and ((weights < 0) | (weights > 1)).any():
        raise ValueError(
            f"merge weights outside [0, 1]: {weights.double().round(decimals=6).tolist()}; allow them with "
            "merge_extrapolate: True (recbole-llm merge: --extrapolate)"
        )


def descend(
    problem: MergeProblem, objective: Callable[[Tensor], Tensor], start: Tensor, rate: float, what: str = "entropy"
) -> tuple[list[dict[str, Any]], Tensor]:
    """Adam: the points from ``start`` on with the objective, named ``what``, and the weights after the last step."""
    # [K] or [M, K]; the clamp moves the start inside the simplex, because softmax has no gradient at the corners
    raw = start.clamp(min=0.05).log().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=rate)
    trace = []
    for _ in range(int(problem.setting("steps", 20))):
        with torch.enable_grad():
            weights = torch.softmax(raw, dim=-1)
            value = objective(weights)
            (raw.grad,) = torch.autograd.grad(value, raw)  # backward() would also fill .grad of the model's weights
        trace.append(measured_point("adam", weights, **{what: value.item()}))
        optimizer.step()
    return trace, torch.softmax(raw, dim=-1).detach()


def single_points(problem: MergeProblem) -> list[tuple[str, Tensor]]:
    """The uniform mixture, then each single adapter: phases and weights."""
    return [(phase, problem.expand(point)) for phase, point in control_points(len(problem.names))]


def lattice_points(problem: MergeProblem) -> list[tuple[str, Tensor]]:
    """The controls, then the rest of the lattice: phases and weights."""
    points = points_of_lattice(len(problem.names), int(problem.setting("points", 11)))
    return [(phase, problem.expand(point)) for phase, point in points]


@torch.no_grad()
def _measure(problem: MergeProblem, phase: str, weights: Tensor, scored: bool = False) -> dict[str, Any]:
    measured = {}
    if problem.objective is not None:
        measured["entropy"] = float(problem.objective(weights))
    if scored and problem.valid_score is not None:
        measured["score"] = float(problem.valid_score(weights))
    return measured_point(phase, weights, **measured)


def measured_point(phase: str, weights: Tensor, **measured: float) -> dict[str, Any]:
    for what, value in measured.items():
        if not math.isfinite(value):
            raise ValueError(f"merge: the {what} is {value} at the weights {weights.tolist()}; is an adapter damaged?")
    return {"phase": phase, "weights": weights.tolist(), **measured}


def best_point(trace: list[dict[str, Any]], what: str, largest: bool = False) -> Tensor:
    """Weights of the minimum (or maximum); ties go to the most even weights, whatever the order of the adapters."""

    def rank(point: dict[str, Any]) -> tuple[float, float]:
        value = -point[what] if largest else point[what]
        return value, torch.tensor(point["weights"]).square().sum().item()

    return torch.tensor(min(trace, key=rank)["weights"])
