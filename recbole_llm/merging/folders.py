"""Merge saved adapters of one base model, from anywhere, into one PEFT folder.

Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_llm.merging.coefficients import MergeProblem, MergeResult

_ENTRYWISE = ("ties", "dare", "dare_ties", "magnitude_prune")
METHODS = ("uniform", "fixed", *_ENTRYWISE, "orthogonal_residual", "factors")
_SEARCHES = ("grid", "entropy")

# the named methods that read an option; every other one would ignore it
READERS = {
    "weights": ("fixed", *_ENTRYWISE, "factors"),
    "density": _ENTRYWISE,
    "seed": ("dare", "dare_ties"),
    "residual": ("orthogonal_residual",),
}


def merge_folders(
    adapters: Sequence[str],
    out: Path,
    *,
    merge: str = "uniform",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    residual: float | None = None,
    seed: int | None = None,
    compress_rank: int | None = None,
    extrapolate: bool = False,
) -> str:
    """Merge PEFT folders into ``out`` and return one line about the result; a mistake writes nothing.

    Args:
        adapters: ``FOLDER`` or ``NAME=FOLDER``; without a name, it is the folder's.
        out: the merged adapter, ``merge.json`` and a README with the SHA-256 of each source; it must not exist yet.
        merge: a method of docs/merging.md that needs no prompts, or ``package.module:function``.
        weights: one for each adapter, in [0, 1] unless ``extrapolate``.
        density: share of entries that is kept, 0.5 by default.
        residual: share of the orthogonal parts, 0.1 by default.
        seed: of the draw, 0 by default.
        compress_rank: the rank to which an SVD reduces the result; None keeps it exact.

    Raises:
        ValueError: adapters that do not go together, an option that the method does not read, or a value that it refuses.
    """
    folders = _folders(adapters)
    given = {"weights": weights, "density": density, "residual": residual, "seed": seed}
    _check(merge, out, given, extrapolate)

    from safetensors import SafetensorError

    from recbole_llm.llm.lora import read_config
    from recbole_llm.merging import coefficients
    from recbole_llm.merging.stage import merge_adapters

    settings = {key: value for key, value in given.items() if value is not None}
    problem = coefficients.MergeProblem(list(folders), [], settings={**settings, "extrapolate": extrapolate})
    try:
        result = merge_adapters(folders, merge, problem, out, split=None, compress_rank=compress_rank)
    except SafetensorError as error:
        raise ValueError(f"--adapters: {error}") from error
    return f"{out}: rank {read_config(out)['r']}, {merge} of {_described(problem, result)}"


def _folders(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder, every one of them a folder of safetensors."""
    folders: dict[str, Path] = {}
    for text in given:
        name, folder = _named_folder(text)
        if name in folders:
            raise ValueError(f"two adapters are named {name!r}: {folders[name]} and {folder}; name them apart as NAME=FOLDER")
        if not folder.is_dir():
            raise ValueError(f"--adapters: there is no folder {folder}")
        if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
            raise ValueError(
                f"{folder} holds a pickled adapter_model.bin, which could run code when it is read; save it again as "
                "safetensors with peft's save_pretrained"
            )
        folders[name] = folder
    if not folders:
        raise ValueError("--adapters: give at least one PEFT folder")
    return folders


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or os.sep in name or Path(text).is_dir():  # folders may have a = of their own
        return Path(text).resolve().name, Path(text)
    if not name or not folder:
        raise ValueError(f"--adapters: {text!r} is neither FOLDER nor NAME=FOLDER")
    return name, Path(folder)


def _check(merge: str, out: Path, given: Mapping[str, Any], extrapolate: bool) -> None:
    """What can be refused before anything is read."""
    if out.exists():
        raise ValueError(f"--out: {out} exists and is never overwritten; choose another folder")
    if merge in _SEARCHES:
        raise ValueError(
            f"--merge={merge} chooses weights by prompts, and there are none here; run a model with "
            f"--merge={merge}, such as recbole-llm run --model=LoRACocktail"
        )
    for option, readers in READERS.items():
        if given[option] is not None and merge in METHODS and merge not in readers:
            raise ValueError(f"--{option} means nothing to --merge={merge}; it is read by {', '.join(readers)}")
    if extrapolate and given["weights"] is None and merge in METHODS:
        raise ValueError("--extrapolate allows --weights outside [0, 1], and none are given")


def _described(problem: MergeProblem, result: MergeResult) -> str:
    """Adapters and weights; the mean over modules where they differ by module."""
    means = result.weights.reshape(-1, len(problem.names)).mean(0).tolist()  # [K]
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(problem.names, means, strict=True))
    return weights if result.weights.dim() == 1 else f"{weights} (means over modules; merge.json has each)"
