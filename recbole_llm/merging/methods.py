"""Merging methods that are more than a weighted sum of the deltas ``dW_i = s_i B_i A_i``, without a full weight matrix.

``ties``, ``dare``, ``dare_ties`` and ``magnitude_prune`` decide entry by entry. Entries of a full ``dW`` would cost
``D_out D_in`` each; those of ``A`` and ``B`` apart mean nothing, as any ``B Q^-1, Q A`` is the same adapter. So they work
in the basis that the adapters of a module share, as KnOTS does (arXiv 2410.19735)::

    [dW_1 ... dW_K] = U S [V_1^T ... V_K^T],    C_i = S V_i^T = U^T dW_i    [R, D_in],    R <= sum r_i

``U`` has orthonormal columns, so each ``C_i`` is its delta, rotated, and nothing is lost. The paper writes the merge of
the ``V_i`` and applies ``S`` after it; the authors' released settings (``s_on_V``) apply ``S`` first, and so do we:
magnitudes then are those of the deltas, and a direction that is almost null cannot outvote a large one. The entrywise
step is peft's own, module by module. ``U merge(C_1, ..., C_K)`` is again a LoRA adapter, of rank ``R``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.merging.arithmetic import Adapter, all_modules, assemble, check_one_base, taking_part
from recbole_llm.merging.coefficients import MergeProblem, MergeResult, controls, given_weights

Entrywise = Callable[[list[Tensor], Tensor, float], Tensor]
"""peft's merges: K tensors of one shape, weights ``[K]`` and a density -> one tensor."""


def ties(problem: MergeProblem) -> MergeResult:
    """Trim the small entries, elect a sign for each, take the mean of those that agree (TIES, arXiv 2306.01708).

    Settings: ``density`` (0.5) that the trim keeps, ``weights`` (1 each, as the step already is a mean), applied after
    the election.
    """
    from peft.utils.merge_utils import ties as merge

    return _entrywise(problem, merge, each=1.0)


def dare(problem: MergeProblem) -> MergeResult:
    """Keep a random share of the entries, divide it by that share, take the weighted sum (DARE, arXiv 2311.03099).

    Settings: ``density`` (0.5) that is kept, ``weights`` (1 / K each), ``seed`` (0) of the draw.
    """
    from peft.utils.merge_utils import dare_linear as merge

    return _entrywise(problem, merge, each=1 / len(problem.names), draws=True)


def dare_ties(problem: MergeProblem) -> MergeResult:
    """DARE's random share in place of TIES's trim, then TIES's election and mean.

    Settings: ``density`` (0.5), ``weights`` (1 each), ``seed`` (0).
    """
    from peft.utils.merge_utils import dare_ties as merge

    return _entrywise(problem, merge, each=1.0, draws=True)


def magnitude_prune(problem: MergeProblem) -> MergeResult:
    """Keep the largest entries of each adapter, take the weighted sum.

    Settings: ``density`` (0.5) that is kept, ``weights`` (1 / K each).
    """
    from peft.utils.merge_utils import magnitude_prune as merge

    return _entrywise(problem, merge, each=1 / len(problem.names))


def orthogonal_residual(problem: MergeProblem) -> MergeResult:
    """The first adapter whole, and of each other one a share of what is orthogonal to it (Frobenius, by module).

    ``dW = dW_1 + l sum_i (dW_i - p_i dW_1)`` with ``p_i = <dW_i, dW_1> / <dW_1, dW_1>``: a weighted sum, whose weights
    ``[M, K]`` are ``1 - l sum_i p_i`` for the first and ``l`` for the others. They need not lie in [0, 1].

    Settings: ``residual`` (0.1), which is ``l``.
    """
    adapters, residual = _adapters(problem), _residual(problem)
    weights = torch.tensor([_projected_out(adapters, module, residual) for module in problem.modules])  # [M, K]
    trace = controls(problem, ("orthogonal_residual", weights))
    return MergeResult(weights, trace, derived=True, settings={"residual": residual})


def factors(problem: MergeProblem) -> MergeResult:
    """``A = sum_i w_i s_i A_i`` and ``B = sum_i w_i B_i``: RecCocktail's equations 6 and 7 as they are written.

    Their product has cross terms ``w_i w_j s_j B_i A_j``, and an adapter's own delta counts ``w_i^2``.

    Settings: ``weights`` (1 / K each). Needs equal ranks and target modules.
    """
    adapters = _adapters(problem)
    _check_alike(adapters)
    weights = given_weights(problem, 1 / len(adapters))  # [K]
    summed = {}
    for module in adapters[0].modules:
        pairs = [adapter.factors(module) for adapter in adapters]  # [r, D_in], [D_out, r]
        a, b = (sum(w * m for w, m in zip(weights, side, strict=True)) for side in zip(*pairs, strict=True))
        summed[module] = a, b
    return MergeResult(weights, controls(problem), merged=assemble(adapters, summed, "merged"))  # type: ignore[arg-type]


# -- the shared basis --------------------------------------------------------------------------------------------------


def shared_basis(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``S`` and the coordinates ``C_i = U^T B_i A_i`` of one module's deltas, in ``O((D_out + K D_in) R^2)``.

    ``U`` and ``S`` are those of ``[dW_1 ... dW_K]``, through the QR of the thin factors; null directions are left out.

    Args:
        pairs: of each adapter ``A`` ``[r_i, D_in]``, scaling included, and ``B`` ``[D_out, r_i]``.

    Returns:
        ``U`` ``[D_out, R]``, ``S`` ``[R]``, ``C`` ``[K, R, D_in]``.
    """
    b = torch.cat([b for _, b in pairs], dim=1)  # [D_out, sum r]
    q, r = torch.linalg.qr(b)  # [D_out, R'], [R', sum r]
    parts = r.split([len(a) for a, _ in pairs], dim=1)  # K times [R', r_i]
    # Q_i of A_i^T = Q_i T_i has orthonormal columns, so it changes neither U nor S
    middle = torch.cat([part @ torch.linalg.qr(a.T, mode="r").R.T for part, (a, _) in zip(parts, pairs, strict=True)], dim=1)
    u, s, _ = torch.linalg.svd(middle, full_matrices=False)  # [R', R'], [R']
    top = max(int((s > s[0] * max(middle.shape) * torch.finfo(s.dtype).eps).sum()), 1)
    u, s = u[:, :top], s[:top]
    coordinates = torch.stack([(u.T @ part) @ a for part, (a, _) in zip(parts, pairs, strict=True)])
    return q @ u, s, coordinates


def _entrywise(problem: MergeProblem, merge: Entrywise, each: float, draws: bool = False) -> MergeResult:
    """One of peft's entrywise merges in the shared basis of every module.

    Args:
        each: the weight of every adapter where none is given.
        draws: whether ``merge`` is random, for the record.
    """
    adapters, density, seed = _adapters(problem), _density(problem), int(_setting(problem, "seed", 0))
    weights = given_weights(problem, each)  # [K]
    with _drawing(seed):
        merged = {
            module: _merge_module(module, taking_part(module, adapters, weights.tolist()), merge, density)
            for module in all_modules(adapters)
        }
    settings = {"density": density} | ({"seed": seed} if draws else {})
    return MergeResult(weights, controls(problem), merged=assemble(adapters, merged, "merged"), settings=settings)


def _merge_module(module: str, parts: Sequence[tuple[float, Adapter]], merge: Entrywise, density: float) -> tuple[Tensor, Tensor]:
    """``A`` ``[R, D_in]`` and ``B`` ``[D_out, R]`` in fp32, of equal size."""
    pairs = [tuple(factor.double() for factor in adapter.factors(module)) for _, adapter in parts]
    u, s, coordinates = shared_basis(pairs)  # type: ignore[arg-type]
    merged = merge(list(coordinates), coordinates.new_tensor([w for w, _ in parts]), density)  # [R, D_in]
    root = torch.where(s > 0, s, 1.0).sqrt()
    return (merged / root[:, None]).float(), (u * root).float()


@contextlib.contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draws from ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # 1 is a choice here
        torch.manual_seed(seed)
        yield


# -- coefficients by module --------------------------------------------------------------------------------------------


def _projected_out(adapters: Sequence[Adapter], module: str, residual: float) -> list[float]:
    """Weights ``[K]`` of one module; an adapter without the module has 0 there."""
    first, *others = adapters
    squared = _inner(first, first, module)
    # without a first delta everything is orthogonal to it
    along = [_inner(other, first, module) / squared if squared else 0.0 for other in others]
    return [float(first.has(module)) - residual * sum(along), *(residual * other.has(module) for other in others)]


def _inner(one: Adapter, two: Adapter, module: str) -> float:
    """``<B_1 A_1, B_2 A_2>`` from the thin factors, ``sum((B_1^T B_2) * (A_1 A_2^T))``; 0 where one lacks the module."""
    if not (one.has(module) and two.has(module)):
        return 0.0
    (a, b), (c, d) = ([factor.double() for factor in adapter.factors(module)] for adapter in (one, two))
    return ((b.T @ d) * (a @ c.T)).sum().item()  # [r_1, r_2]


# -- settings and checks -----------------------------------------------------------------------------------------------


def _adapters(problem: MergeProblem) -> list[Adapter]:
    if [adapter.name for adapter in problem.adapters] != problem.names:
        found = [adapter.name for adapter in problem.adapters]
        raise ValueError(
            f"this merge method reads the adapters themselves: the problem names {problem.names}, its adapters are {found}; "
            "merge_adapters fills them in"
        )
    check_one_base(problem.adapters)
    return problem.adapters


def _setting(problem: MergeProblem, key: str, default: Any) -> Any:
    value = problem.settings.get(key)
    return default if value is None else value


def _density(problem: MergeProblem) -> float:
    value = _setting(problem, "density", 0.5)
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"merge_density must be in (0, 1], got {value!r}; 1 keeps every entry")
    return float(value)


def _residual(problem: MergeProblem) -> float:
    value = _setting(problem, "residual", 0.1)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"merge_residual must be in [0, 1], got {value!r}; 0 leaves the first adapter alone")
    return float(value)


def _check_alike(adapters: Sequence[Adapter]) -> None:
    first, *others = ({module: len(a.factors(module)[0]) for module in a.modules} for a in adapters)
    for adapter, ranks in zip(adapters[1:], others, strict=True):
        for module in sorted(first.keys() | ranks.keys()):
            one, two = first.get(module, "no factors"), ranks.get(module, "no factors")
            if one != two:
                raise ValueError(
                    f"merge: factors needs equal ranks and target modules, but in {module} the adapters "
                    f"{adapters[0].name!r} and {adapter.name!r} have {one} and {two}; 'uniform' and 'fixed' sum any two"
                )
