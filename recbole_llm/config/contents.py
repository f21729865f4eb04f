"""The files that settings name: their contents, which can change a result, belong to the fingerprint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_llm.config.predictions import predictions_file
from recbole_llm.store.files import sha256_file

PRETRAINED = ("pre_model_path", "pretrain_path", "mf_pretrain_path", "mlp_pretrain_path", "warm_up")
"""RecBole's settings of checkpoints that a model starts from (RaCT, S3Rec, ConvNCF, NAIS, NeuMF, KD_DAGFM)."""


def pretrained(config: Any) -> dict[str, str]:
    """The SHA-256 of each checkpoint of :data:`PRETRAINED` that a run names and that exists."""
    files = {key: Path(str(config[key])).expanduser() for key in PRETRAINED if config[key]}
    return {f"{key}_sha256": sha256_file(file) for key, file in files.items() if file.is_file()}


def contents(config: Any) -> dict[str, str | None]:
    """Those, and the SHA-256 of the predictions of ``Imported``."""
    found: dict[str, str | None] = dict(pretrained(config))
    if config["model"] == "Imported":
        found["predictions_sha256"] = config["predictions"] and sha256_file(predictions_file(config))
    return found
