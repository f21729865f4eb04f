"""The file of predictions that ``--model=Imported`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def predictions_file(config: Any) -> Path:
    """The file that ``predictions`` names, where ``{seed}`` stands for the seed.

    Raises:
        ValueError, FileNotFoundError: no file is named, or there is none.
    """
    if not config["predictions"]:
        raise ValueError(f"predictions: {config['model']} needs a file; give --predictions=FILE (docs/models/imported.md)")
    file = Path(str(config["predictions"]).replace("{seed}", str(config["seed"]))).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"predictions: there is no file {file} (current folder: {Path.cwd()})")
    return file
