"""Runs that somebody shared: a folder, or ``hub:user/name``, with one run's record, its stages and a manifest of all files.

Such a folder has the layout of a ``checkpoint_dir`` (``runs/RUN/record.json``, ``stages/``), so that it is read like a run of
one's own. It may have been made by anybody: every file is checked against the manifest before one is read, and only kinds of
files that cannot execute code are accepted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recbole_llm.store.files import MANIFEST, DamagedError, verify
from recbole_llm.store.hub import PREFIX, download
from recbole_llm.store.json_files import read_object

CARD, WEIGHTS, PASSPORT, SETTINGS = "README.md", "weights.safetensors", "passport.json", "settings.json"
KINDS = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".png")
"""Endings of the files of a shared run."""
_MODULES = "modules.json"  # of a SentenceTransformer: names classes
MOST_LAYERS = 64
FOLDER = "folder:"
"""In a shared record, before the name of a base model that is a folder on its author's machine, and no hub id."""


_MODELS = ("cf_model", "cheap_model", "llm_ranker", "retriever")
"""The keys that name models, beside ``model`` itself."""


def author_code(config: Mapping[str, Any]) -> str | None:
    """The first model or merge function of a user that the settings of a run name, which no shared run may have."""
    merges = [config.get("merge"), *(config.get("merge_beside") or {}).values()]
    named = [config.get(key) for key in _MODELS] + [one.get("merge") if isinstance(one, dict) else one for one in merges]
    return next((name for name in named if isinstance(name, str) and (":" in name or "." in name)), None)


def is_shared(root: Path) -> bool:
    """Whether ``root`` is a shared run, and not a ``checkpoint_dir``."""
    return (root / MANIFEST).is_file() and (root / "runs").is_dir()


def shared_record(given: str, key: str) -> Path | None:
    """The record of a shared run, checked; None if ``given`` is neither the folder of one nor ``hub:user/name``.

    Raises:
        ValueError: it is damaged, has no run or several, or as :func:`~recbole_llm.store.hub.download`; names ``key``.
    """
    if given.startswith(PREFIX):
        root = download(given, key, KINDS)
    elif not is_shared(root := Path(os.path.abspath(Path(given).expanduser()))):
        return None
    try:
        _check(root)
    except (DamagedError, OSError) as error:
        fault = str(error).partition("; delete the folder")[0]
        raise ValueError(f"{key}={given} is not a shared run as it was written: {fault}; get it again") from error
    found = sorted(root.glob("runs/*/record.json"))
    if len(found) != 1:
        raise ValueError(f"{key}={given}: a shared run has one record, and this has {len(found)}; get it again")
    return found[0]


def _check(root: Path) -> None:
    """Check all files against the manifest.

    Raises:
        DamagedError: a file is missing, differs, is of another kind, or names code; names it.
    """
    verify(root, besides=(CARD,))
    for name in read_object(root / MANIFEST, 2**26):
        if not name.endswith(KINDS):
            raise DamagedError(f"{root / name} is no kind of file that a shared run has ({', '.join(KINDS)})")
    for file in root.rglob(_MODULES):
        for kind in _kinds(file):
            if not kind.startswith("sentence_transformers."):
                raise DamagedError(f"{file} names the class {kind}, which is not one of sentence_transformers")


def _kinds(file: Path) -> Iterator[str]:
    if file.stat().st_size > 2**20:
        raise DamagedError(f"{file} is too large")
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        yield from (str(module["type"]) for module in modules[:MOST_LAYERS])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error}") from error
