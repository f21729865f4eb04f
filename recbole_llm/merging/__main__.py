"""``python -m recbole_llm.merging``: merge saved adapters of one base model, from anywhere, into one PEFT folder.

Nothing heavy is imported before the arguments are read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from recbole_llm.merging.coefficients import MergeProblem, MergeResult

_ENTRYWISE = ("ties", "dare", "dare_ties", "magnitude_prune")
_NAMED = ("uniform", "fixed", *_ENTRYWISE, "orthogonal_residual", "factors")
_SEARCHES = ("grid", "entropy")

# the named methods that read an option; to any other one it would be silently nothing
_READERS = {
    "weights": ("fixed", *_ENTRYWISE, "factors"),
    "density": _ENTRYWISE,
    "seed": ("dare", "dare_ties"),
    "residual": ("orthogonal_residual",),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge and say what was written; a mistake ends in one line and exit code 2, and writes nothing."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        folders = _folders(options.adapters)
        _check(options)
    except ValueError as error:
        parser.error(str(error))

    from safetensors import SafetensorError

    from recbole_llm.llm.lora import read_config
    from recbole_llm.merging import coefficients
    from recbole_llm.merging.stage import merge_adapters

    given = {key: getattr(options, key) for key in (*_READERS, "extrapolate")}
    settings = {key: value for key, value in given.items() if value is not None}
    try:
        problem = coefficients.MergeProblem(list(folders), [], settings=settings)
        result = merge_adapters(folders, options.merge, problem, options.out, split=None, compress_rank=options.compress_rank)
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    print(f"{options.out}: rank {read_config(options.out)['r']}, {options.merge} of {_told(problem, result)}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m recbole_llm.merging",
        description="Merge LoRA adapters of one base model into one ordinary PEFT folder with a record of its sources.",
        epilog="entropy and grid choose weights by prompts: run a model with --merge=entropy instead.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--adapters", nargs="+", required=True, metavar="[NAME=]FOLDER", help="PEFT folders; a name is the folder's if not given")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the merged adapter; it must not exist yet")
    add("--merge", default="uniform", metavar="METHOD", help=f"{', '.join(_NAMED)}, or package.module:function (uniform)")
    add("--weights", type=float, nargs="+", metavar="W", help=f"one for each adapter ({', '.join(_READERS['weights'])})")
    add("--density", type=float, metavar="D", help=f"share of entries that is kept, 0.5 ({', '.join(_READERS['density'])})")
    add("--residual", type=float, metavar="L", help="share of the orthogonal parts, 0.1 (orthogonal_residual)")
    add("--seed", type=int, metavar="N", help="of the draw, 0 (dare, dare_ties)")
    add("--compress_rank", type=int, metavar="R", help="cut the result back to this rank by an SVD")
    add("--extrapolate", action="store_true", help="allow weights outside [0, 1]")
    return parser


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
    return folders


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or os.sep in name or Path(text).is_dir():  # folders may have a = of their own
        return Path(text).resolve().name, Path(text)
    if not name or not folder:
        raise ValueError(f"--adapters: {text!r} is neither FOLDER nor NAME=FOLDER")
    return name, Path(folder)


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    if options.out.exists():
        raise ValueError(f"--out: {options.out} exists and is never overwritten; choose another folder")
    if options.merge in _SEARCHES:
        raise ValueError(
            f"--merge={options.merge} chooses weights by prompts, and there are none here; run a model with "
            f"--merge={options.merge}, such as run_recbole_llm.py --model=LoRACocktail"
        )
    for option, readers in _READERS.items():
        if getattr(options, option) is not None and options.merge in _NAMED and options.merge not in readers:
            raise ValueError(f"--{option} means nothing to --merge={options.merge}; it is read by {', '.join(readers)}")
    if options.extrapolate and options.weights is None and options.merge in _NAMED:
        raise ValueError("--extrapolate allows --weights outside [0, 1], and none are given")


def _told(problem: MergeProblem, result: MergeResult) -> str:
    """Adapters and weights; the mean over modules where they differ by module."""
    means = result.weights.reshape(-1, len(problem.names)).mean(0).tolist()  # [K]
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(problem.names, means, strict=True))
    return weights if result.weights.dim() == 1 else f"{weights} (means over modules; merge.json has each)"


if __name__ == "__main__":
    main()
