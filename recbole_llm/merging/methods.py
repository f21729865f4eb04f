"""Merge methods that are not a fixed weighted sum of the deltas ``dW_i = s_i B_i A_i``; none builds a full weight matrix.

``ties``, ``dare``, ``dare_ties`` and ``magnitude_prune`` work on single entries. A full ``dW`` has ``D_out D_in`` entries;
entries of ``A`` and ``B`` have no meaning by themselves, since ``B Q^-1, Q A`` is the same adapter for any ``Q``. So these
methods work in a basis that the adapters of a module share, as KnOTS does (arXiv 2410.19735)::

    [dW_1 ... dW_K] = U S [V_1^T ... V_K^T],    C_i = S V_i^T = U^T dW_i    [R, D_in],    R <= sum r_i

``U`` has orthonormal columns, so each ``C_i`` is a rotation of its delta without loss. The paper merges the ``V_i`` and
then applies ``S``; we apply ``S`` first, as the authors' released settings do (``s_on_V``). Magnitudes are then those of the
deltas, and a direction of small singular value has little influence. The entrywise step is peft's, applied to each module.
``U merge(C_1, ..., C_K)`` is again a LoRA adapter, of rank ``R``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recbole_llm.llm.adapter_folders import Adapter
from recbole_llm.merging.arithmetic import all_modules, assemble, check_one_base, taking_part
from recbole_llm.merging.coefficients import MergeProblem, MergeResult, controls, given_weights
from recbole_llm.merging.geometry import inner
from recbole_llm.store.random_state import preserved_random_state

Entrywise = Callable[[list[Tensor], Tensor, float], Tensor]
"""Signature of peft's merge functions: K tensors of one shape, weights ``[K]`` and a density -> one tensor."""


def ties(problem: MergeProblem) -> MergeResult:
    """Trim small entries, elect a sign for each entry, average the values of that sign (TIES, arXiv 2306.01708).

    Settings: ``density`` (0.5), the share of entries that the trim retains; ``weights`` (1 each, since the step averages),
    applied after the election.
    """
    from peft.utils.merge_utils import ties as merge

    return _entrywise(problem, merge, each=1.0)


def dare(problem: MergeProblem) -> MergeResult:
    """Drop random entries, rescale the others, take the weighted sum (DARE, arXiv 2311.03099).

    Settings: ``density`` (0.5), the share of entries that is retained; ``weights`` (1 / K each); ``seed`` (0) of the draw.
    """
    from peft.utils.merge_utils import dare_linear as merge

    return _entrywise(problem, merge, each=1 / len(problem.names), draws=True)


def dare_ties(problem: MergeProblem) -> MergeResult:
    """TIES with DARE's random drop in place of the trim.

    Settings: ``density`` (0.5), ``weights`` (1 each), ``seed`` (0).
    """
    from peft.utils.merge_utils import dare_ties as merge

    return _entrywise(problem, merge, each=1.0, draws=True)


def magnitude_prune(problem: MergeProblem) -> MergeResult:
    """Retain the largest entries of each adapter, take the weighted sum.

    Settings: ``density`` (0.5), the share of entries that is retained; ``weights`` (1 / K each).
    """
    from peft.utils.merge_utils import magnitude_prune as merge

    return _entrywise(problem, merge, each=1 / len(problem.names))


def orthogonal_residual(problem: MergeProblem) -> MergeResult:
    """The first adapter plus a share of the part of each other adapter that is orthogonal to it (Frobenius, by module).

    ``dW = dW_1 + l sum_i (dW_i - p_i dW_1)`` with ``p_i = <dW_i, dW_1> / <dW_1, dW_1>``: a weighted sum whose weights
    ``[M, K]`` are ``1 - l sum_i p_i`` for the first and ``l`` for the others. They may lie outside [0, 1].

    Settings: ``residual`` (0.1), which is ``l``.
    """
    adapters, residual = _adapters(problem), _share(problem, "residual", 0.1, positive=False)
    weights = torch.tensor([_projected_out(adapters, module, residual) for module in problem.modules])  # [M, K]
    trace = controls(problem, ("orthogonal_residual", weights))
    return MergeResult(weights, trace, derived=True, settings={"residual": residual})


def factors(problem: MergeProblem) -> MergeResult:
    """``A = sum_i w_i s_i A_i`` and ``B = sum_i w_i B_i``: RecCocktail's equations 6 and 7 as written.

    The product has cross terms ``w_i w_j s_j B_i A_j``, and the weight of an adapter's own delta is ``w_i^2``.

    Settings: ``weights`` (1 / K each). The adapters must have equal ranks and target modules.
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


def shared_basis(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``S`` and the coordinates ``C_i = U^T B_i A_i`` of one module's deltas, in ``O((D_out + K D_in) R^2)``.

    ``U`` and ``S`` are those of ``[dW_1 ... dW_K]``, from QR decompositions of the thin factors, without null directions.

    Args:
        pairs: for each adapter, ``A`` ``[r_i, D_in]`` with its scaling, and ``B`` ``[D_out, r_i]``.

    Returns:
        ``U`` ``[D_out, R]``, ``S`` ``[R]``, ``C`` ``[K, R, D_in]``.
    """
    b = torch.cat([b for _, b in pairs], dim=1)  # [D_out, sum r]
    q, r = torch.linalg.qr(b)  # [D_out, R'], [R', sum r]
    parts = r.split([len(a) for a, _ in pairs], dim=1)  # K times [R', r_i]
    # in A_i^T = Q_i T_i, Q_i has orthonormal columns and so affects neither U nor S
    middle = torch.cat([part @ torch.linalg.qr(a.T, mode="r").R.T for part, (a, _) in zip(parts, pairs, strict=True)], dim=1)
    u, s, _ = torch.linalg.svd(middle, full_matrices=False)  # [R', R'], [R']
    top = max(int((s > s[0] * max(middle.shape) * torch.finfo(s.dtype).eps).sum()), 1)
    u, s = u[:, :top], s[:top]
    coordinates = torch.stack([(u.T @ part) @ a for part, (a, _) in zip(parts, pairs, strict=True)])
    return q @ u, s, coordinates


def _entrywise(problem: MergeProblem, merge: Entrywise, each: float, draws: bool = False) -> MergeResult:
    """One of peft's entrywise merges in the shared basis of each module.

    Args:
        each: the default weight.
        draws: whether ``merge`` is random, for the record.
    """
    adapters, density, seed = _adapters(problem), _share(problem, "density", 0.5), int(problem.setting("seed", 0))
    weights = given_weights(problem, each)  # [K]
    with preserved_random_state(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # peft warns of density 1, which is valid here
        torch.manual_seed(seed)
        merged = {
            module: _merge_module(module, taking_part(module, adapters, weights.tolist()), merge, density)
            for module in all_modules(adapters)
        }
    settings = {"density": density} | ({"seed": seed} if draws else {})
    return MergeResult(weights, controls(problem), merged=assemble(adapters, merged, "merged"), settings=settings)


def _merge_module(module: str, parts: Sequence[tuple[float, Adapter]], merge: Entrywise, density: float) -> tuple[Tensor, Tensor]:
    """``A`` ``[R, D_in]`` and ``B`` ``[D_out, R]`` in fp32, with ``S`` split evenly between them."""
    pairs = [tuple(factor.double() for factor in adapter.factors(module)) for _, adapter in parts]
    u, s, coordinates = shared_basis(pairs)  # type: ignore[arg-type]
    merged = merge(list(coordinates), coordinates.new_tensor([w for w, _ in parts]), density)  # [R, D_in]
    root = torch.where(s > 0, s, 1.0).sqrt()
    return (merged / root[:, None]).float(), (u * root).float()


def _projected_out(adapters: Sequence[Adapter], module: str, residual: float) -> list[float]:
    """Weights ``[K]`` of one module; 0 for an adapter without the module."""
    first, *others = adapters
    squared = inner(first, first, module)
    # if the first delta is 0, every delta is orthogonal to it
    along = [inner(other, first, module) / squared if squared else 0.0 for other in others]
    return [float(first.has(module)) - residual * sum(along), *(residual * other.has(module) for other in others)]


def _adapters(problem: MergeProblem) -> list[Adapter]:
    if (found := [adapter.name for adapter in problem.adapters]) != problem.names:
        raise ValueError(f"merge: the problem names {problem.names}, but its adapters are {found}; use merge_adapters")
    check_one_base(problem.adapters)
    return problem.adapters


def _share(problem: MergeProblem, key: str, default: float, positive: bool = True) -> float:
    value = problem.setting(key, default)
    if not isinstance(value, int | float) or not 0 <= value <= 1 or (positive and value == 0):
        raise ValueError(f"merge_{key} must be in {'(' if positive else '['}0, 1], got {value!r}")
    return float(value)


def _check_alike(adapters: Sequence[Adapter]) -> None:
    first, *others = ({module: len(a.factors(module)[0]) for module in a.modules} for a in adapters)
    for adapter, ranks in zip(adapters[1:], others, strict=True):
        for module in sorted(first.keys() | ranks.keys()):
            one, two = first.get(module, "no factors"), ranks.get(module, "no factors")
            if one != two:
                raise ValueError(
                    f"merge: factors needs equal ranks and target modules, but in {module} the adapters "
                    f"{adapters[0].name!r} and {adapter.name!r} have {one} and {two}; use 'uniform' or 'fixed'"
                )
