"""The merge of adapters into one ordinary PEFT folder, by a method of this package or a function of the user.

``merge: uniform | fixed | entropy`` choose the weights of an exact sum; for the other methods see
:mod:`recbole_llm.merging.rules` and :mod:`recbole_llm.merging.methods`. A dotted path names any function from a
:class:`~recbole_llm.merging.coefficients.MergeProblem` to a :class:`~recbole_llm.merging.coefficients.MergeResult`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_llm import registry
from recbole_llm.llm.adapter_folders import WEIGHTS_FILE, Adapter, check_exact, read_adapter
from recbole_llm.merging import coefficients, methods, rules
from recbole_llm.merging.arithmetic import (
    MERGE_FILE,
    all_modules,
    compress,
    weighted_sum,
    write_adapter,
)
from recbole_llm.merging.coefficients import MergeProblem, MergeResult, check_weights
from recbole_llm.merging.geometry import pairs

logger = getLogger()

MergeMethod = Callable[[MergeProblem], MergeResult]

_METHODS: dict[str, MergeMethod] = {
    method.__name__: method
    for method in (
        *(coefficients.uniform, coefficients.fixed, coefficients.entropy),
        *(rules.grid, rules.calibrated_entropy, rules.agreement, rules.likelihood, rules.auto),
        *(methods.ties, methods.dare, methods.dare_ties, methods.magnitude_prune),
        *(methods.orthogonal_residual, methods.factors),
    )
}


def resolve(name: str) -> MergeMethod:
    """The method of that name, ``package.module:function`` or ``package.module.function``.

    Raises:
        ValueError: unknown name (the error has the nearest known one) or function, or as :func:`registry.own_module`.
    """
    if name in _METHODS:
        return _METHODS[name]
    module_name, _, function = name.replace(":", ".").rpartition(".")
    if not module_name or not function:
        near = difflib.get_close_matches(name, _METHODS, n=1, cutoff=0.0)
        raise ValueError(
            f"merge: {name!r} is unknown; did you mean {near[0]!r}? Choose one of {sorted(_METHODS)}, "
            "or your own function as 'package.module:function'"
        )
    method = getattr(registry.own_module(module_name, f"merge: {name!r}"), function, None)
    if not callable(method):
        raise ValueError(f"merge: the module {module_name!r} has no function {function!r}")
    return method


def merge_adapters(
    folders: Mapping[str, Path],
    method: str,
    problem: MergeProblem,
    out: Path,
    *,
    split: str | None = "valid",
    compress_rank: int | None = None,
) -> MergeResult:
    """Merge adapters and write one PEFT folder with ``merge.json`` in it.

    The result is the exact sum by the method's weights, unless the method returns the merged adapter.

    Args:
        folders: adapter name -> PEFT folder, in the order of ``problem.names``.
        method: see :func:`resolve`.
        out: written atomically.
        split: the split of the objective's unlabelled prompts, for the record (``test`` is transductive; None: no prompts).
        compress_rank: truncate the result to this rank by an SVD; the record has the retained energy.

    Raises:
        ValueError: unknown method, weights out of range, adapters that cannot be summed exactly.
    """
    from recbole_llm.store.files import atomic_folder, sha256_file

    if list(folders) != problem.names:
        raise ValueError(f"merge: the folders are named {list(folders)}, but the merge problem {problem.names}")
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    problem = dataclasses.replace(problem, adapters=adapters, modules=problem.modules or all_modules(adapters))
    result = resolve(method)(problem)
    check_weights(problem, result.weights, bounded=not result.derived)
    merged, energy = _merged(problem, result), None
    if compress_rank is not None:
        merged, energy = compress(merged, compress_rank)
        logger.info(f"merge: rank {compress_rank} retains {energy:.4f} of the squared norm")
    card = {
        "method": method,
        "granularity": "module" if result.weights.dim() == 2 else "global",
        "split": split,
        "settings": problem.settings | result.settings,
        "sources": [{"name": n, "sha256": sha256_file(f / WEIGHTS_FILE)} for n, f in folders.items()],
        "weights": _named(problem, result.weights),
        "compress_rank": compress_rank,
        "retained_energy": energy,
        "pairs": pairs(problem.adapters, result.trace),
        "trace": result.trace,
    }
    with atomic_folder(out) as folder:
        write_adapter(merged, folder, card)
    logger.info(f"merge: {method} of {described(problem, result)}")
    return result


def described(problem: MergeProblem, result: MergeResult) -> str:
    """Adapters and weights as text; weights by module are averaged."""
    means = result.weights.reshape(-1, len(problem.names)).mean(0).tolist()  # [K]
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(problem.names, means, strict=True))
    return weights if result.weights.dim() == 1 else f"{weights} (means over modules; see {MERGE_FILE})"


def _merged(problem: MergeProblem, result: MergeResult) -> Adapter:
    """The method's merged adapter, or the exact sum by its weights."""
    if result.merged is not None:
        check_exact(result.merged)
        return result.merged
    if result.weights.dim() == 1:
        return weighted_sum(problem.adapters, result.weights)
    return weighted_sum(problem.adapters, dict(zip(problem.modules, result.weights, strict=True)))


def _named(problem: MergeProblem, weights: Tensor) -> dict[str, Any]:
    """Adapter -> weight, or module -> adapter -> weight."""
    if weights.dim() == 1:
        return dict(zip(problem.names, weights.tolist(), strict=True))
    rows = weights.tolist()
    return {m: dict(zip(problem.names, row, strict=True)) for m, row in zip(problem.modules, rows, strict=True)}
