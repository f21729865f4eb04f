"""What is checked of a run that somebody shared, and of base models that have moved, beside what is checked of every run."""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.quick_start import Run
from recbole_llm.store.shared_runs import FOLDER, author_code

logger = getLogger()


def check_names(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a shared run that names code of its author.

    Raises:
        ValueError: names it.
    """
    if name := author_code(record["config"]):
        raise ValueError(f"--run: {path} names {name!r}, code of its author, which is not part of a shared run")


def check_moved(record: Mapping[str, Any], moved: Mapping[str, str]) -> None:
    """Refuse a run whose base model is a folder of its author, if no other one is given.

    Raises:
        ValueError: names the model and the option.
    """
    for key in ("llm_path", "text_encoder_path"):
        given = str(record["config"].get(key))
        if given.startswith(FOLDER) and key not in moved:
            name = given.removeprefix(FOLDER)
            raise ValueError(f"--run: the run was trained on {name}, which is not shared with it; give --{key}=FOLDER of {name}")


def check_base(record: Mapping[str, Any], parts: Run) -> None:
    """Refuse another LM than the one whose adapters the run has, where both are known by the hash of their folders.

    Raises:
        ValueError: names both.
    """
    backbone, known = parts.trainer.recommender.backbone, (record.get("backbone_identity") or "").split(", ")
    if backbone is None or backbone.stages or backbone.identity in known:
        return
    if "@" in backbone.identity or any("@" in identity for identity in known):
        logger.warning(f"llm_path: {backbone.name} is taken for {record['backbone']}, which cannot be compared")
        return
    raise ValueError(
        f"--llm_path={parts.config['llm_path']}: this is not {record['backbone']}, on which the run was trained (its files have "
        "another SHA-256)"
    )
