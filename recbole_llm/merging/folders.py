"""Merge saved adapters of one base model into one PEFT folder, without a run.

The arguments are checked before torch and peft are imported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ENTRYWISE = ("ties", "dare", "dare_ties", "magnitude_prune")
METHODS = ("uniform", "fixed", *_ENTRYWISE, "orthogonal_residual", "factors")
_SEARCHES = ("grid", "entropy", "calibrated_entropy", "agreement", "likelihood", "auto")

# the methods of BUILTIN that use each option
READERS = {
    "weights": ("fixed", *_ENTRYWISE, "factors"),
    "density": _ENTRYWISE,
    "seed": ("dare", "dare_ties"),
    "residual": ("orthogonal_residual",),
}

BUILTIN = (*METHODS, *_SEARCHES)


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
    full_model: Path | None = None,
    base_model: str | None = None,
) -> str:
    """Merge PEFT folders into ``out`` and return what was written; after an error, ``out`` does not exist.

    Args:
        adapters: ``FOLDER`` or ``NAME=FOLDER``, or hub ids in place of folders; the default name is the last part of either.
        out: a new folder for the merged adapter, ``merge.json`` and a README with the SHA-256 of each source.
        merge: a method of docs/merging.md that needs no prompts, or ``package.module:function``.
        weights: one for each adapter, in [0, 1] unless ``extrapolate``.
        density: share of entries that is retained, 0.5 by default.
        residual: share of the orthogonal parts, 0.1 by default.
        seed: of the draw, 0 by default.
        compress_rank: the rank to which an SVD reduces the result; None keeps it exact.
        full_model: a new folder for the base model with the merged adapter folded into its weights; None writes none.
        base_model: folder or hub id of the base model, for ``full_model``; None: the one that the adapters name.

    Raises:
        FileNotFoundError: a folder or the base model is missing.
        ValueError: incompatible adapters, one that changes nothing, an option that the method does not use, an invalid value.
    """
    given = {"weights": weights, "density": density, "residual": residual, "seed": seed}
    _check(merge, out, given, extrapolate)
    folders = _folders(adapters)
    if base_model is not None and full_model is None:
        raise ValueError("--base_model has no effect without --full_model")

    from recbole_llm.llm.adapter_folders import read_config
    from recbole_llm.merging.coefficients import MergeProblem
    from recbole_llm.merging.stage import described, merge_adapters

    settings = {key: value for key, value in given.items() if value is not None}
    problem = MergeProblem(list(folders), [], settings={**settings, "extrapolate": extrapolate})
    base = _checked_adapters(folders, full_model, base_model)
    result = merge_adapters(folders, merge, problem, out, split=None, compress_rank=compress_rank)
    lines = [f"{out}: rank {read_config(out)['r']}, {merge} of {described(problem, result)}"]
    if full_model is not None:
        from recbole_llm.merging.full_model import write_full_model

        try:
            lines.append(write_full_model(str(base), out, full_model))
        except BaseException:
            shutil.rmtree(out)
            raise
    return "\n".join(lines)


def _checked_adapters(folders: Mapping[str, Path], full_model: Path | None, base_model: str | None) -> str | None:
    """Check each adapter, and for a full model that they fit the base model, which is returned."""
    from recbole_llm.llm.adapter_fit import check_fit
    from recbole_llm.llm.adapter_folders import check_changes, read_adapter
    from recbole_llm.llm.causal_lm import load_config

    adapters = {}
    for name, folder in folders.items():
        try:
            adapters[name] = read_adapter(folder, name)
            check_changes(adapters[name], folder)
        except ValueError as error:
            raise ValueError(f"--adapters: {error}") from error
    if full_model is None:
        return None
    if full_model.exists():
        raise ValueError(f"--full_model: {full_model} exists and is not overwritten; choose another folder")
    base = base_model or next((a.config.get("base_model_name_or_path") for a in adapters.values()), None)
    if base is None:
        raise ValueError("--full_model: the adapters do not name their base model; give --base_model=FOLDER_OR_HUB_ID")
    try:
        config = load_config(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--full_model: {error}; or give --base_model=FOLDER_OR_HUB_ID") from error
    for name, folder in folders.items():
        check_fit(adapters[name], folder, config)
    return str(base)


def _folders(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder."""
    folders: dict[str, Path] = {}
    for text in given:
        name, folder = _named_folder(text)
        if name in folders:
            raise ValueError(
                f"two adapters are named {name!r}: {folders[name]} and {folder}; give different names as NAME=FOLDER"
            )
        folders[name] = folder if folder.is_dir() else _on_hub(str(folder))
    if not folders:
        raise ValueError("--adapters: give at least one PEFT folder")
    return folders


def _on_hub(given: str) -> Path:
    if "/" not in given:  # known without torch
        raise FileNotFoundError(f"--adapters: there is no folder {given}; give a PEFT folder or a hub id such as owner/name")
    from recbole_llm.llm.adapter_fit import adapter_folder

    try:
        return adapter_folder(given)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--adapters: {error}") from error


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
            f"--merge={merge} needs prompts or validation users, which only a run has; run a model with it, "
            f"as in recbole-llm run --model=LoRACocktail --merge={merge}"
        )
    for option, readers in READERS.items():
        if given[option] is not None and merge in METHODS and merge not in readers:
            raise ValueError(f"--{option} has no effect with --merge={merge}; it is used by {', '.join(readers)}")
    if extrapolate and given["weights"] is None and merge in METHODS:
        raise ValueError("--extrapolate allows --weights outside [0, 1], but no weights are given")
