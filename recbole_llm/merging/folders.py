"""Merge saved adapters of one base model into one PEFT folder, without a run.

The arguments are checked before torch and peft are imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ENTRYWISE = ("ties", "dare", "dare_ties", "magnitude_prune")
METHODS = ("uniform", "fixed", *_ENTRYWISE, "orthogonal_residual", "factors")
_SEARCHES = ("grid", "entropy")

# the methods of METHODS that use each option
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
    """Merge PEFT folders into ``out`` and return one line about the result; after an error, ``out`` does not exist.

    Args:
        adapters: ``FOLDER`` or ``NAME=FOLDER``; the default name is the folder's.
        out: a new folder for the merged adapter, ``merge.json`` and a README with the SHA-256 of each source.
        merge: a method of docs/merging.md that needs no prompts, or ``package.module:function``.
        weights: one for each adapter, in [0, 1] unless ``extrapolate``.
        density: share of entries that is retained, 0.5 by default.
        residual: share of the orthogonal parts, 0.1 by default.
        seed: of the draw, 0 by default.
        compress_rank: the rank to which an SVD reduces the result; None keeps it exact.

    Raises:
        ValueError: incompatible adapters, an option that the method does not use, or an invalid value.
    """
    folders = _folders(adapters)
    given = {"weights": weights, "density": density, "residual": residual, "seed": seed}
    _check(merge, out, given, extrapolate)

    from safetensors import SafetensorError

    from recbole_llm.llm.adapter_folders import read_config
    from recbole_llm.merging.coefficients import MergeProblem
    from recbole_llm.merging.stage import described, merge_adapters

    settings = {key: value for key, value in given.items() if value is not None}
    problem = MergeProblem(list(folders), [], settings={**settings, "extrapolate": extrapolate})
    try:
        result = merge_adapters(folders, merge, problem, out, split=None, compress_rank=compress_rank)
    except SafetensorError as error:
        raise ValueError(f"--adapters: {error}") from error
    return f"{out}: rank {read_config(out)['r']}, {merge} of {described(problem, result)}"


def _folders(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder."""
    folders: dict[str, Path] = {}
    for text in given:
        name, folder = _named_folder(text)
        if name in folders:
            raise ValueError(
                f"two adapters are named {name!r}: {folders[name]} and {folder}; give different names as NAME=FOLDER"
            )
        if not folder.is_dir():
            raise ValueError(f"--adapters: there is no folder {folder}")
        folders[name] = folder
    if not folders:
        raise ValueError("--adapters: give at least one PEFT folder")
    return folders


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or os.sep in name or Path(text).is_dir():  # a folder's name may contain =
        return Path(text).resolve().name, Path(text)
    if not name or not folder:
        raise ValueError(f"--adapters: {text!r} is neither FOLDER nor NAME=FOLDER")
    return name, Path(folder)


def _check(merge: str, out: Path, given: Mapping[str, Any], extrapolate: bool) -> None:
    """Checks that read no file of an adapter."""
    if out.exists():
        raise ValueError(f"--out: {out} exists and is not overwritten; choose another folder")
    if merge in _SEARCHES:
        raise ValueError(
            f"--merge={merge} needs prompts, which only a run has; run a model with it, "
            f"as in recbole-llm run --model=LoRACocktail --merge={merge}"
        )
    for option, readers in READERS.items():
        if given[option] is not None and merge in METHODS and merge not in readers:
            raise ValueError(f"--{option} has no effect with --merge={merge}; it is used by {', '.join(readers)}")
    if extrapolate and given["weights"] is None and merge in METHODS:
        raise ValueError("--extrapolate allows --weights outside [0, 1], but no weights are given")
