"""The base models of a run, for its model card: names on the hub, and their licences as far as they can be found out here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from recbole_llm.llm.adapter_folders import base_model_name
from recbole_llm.llm.packages import distribution_of, is_package

_KEYS = {"llm_path": "backbone", "text_encoder_path": "text encoder"}


@dataclass(frozen=True)
class BaseModel:
    """A model that the run builds upon, which is not part of what is shared.

    Attributes:
        part: what it is in the run.
        name: a hub id, or the name of a folder or package.
        on_hub: whether the name is a hub id.
        licence: of the hub's identifiers, such as ``apache-2.0``; None: not found.
        key: the setting that names it.
    """

    part: str
    name: str
    on_hub: bool
    licence: str | None
    key: str


def base_models(record: Mapping[str, Any]) -> list[BaseModel]:
    """The pretrained parts of a run; the builtin ones are trained by the run itself and are among its stages."""
    known, found = record.get("backbone_identity"), []
    for key, part in _KEYS.items():
        path = record["config"].get(key)
        if known and isinstance(path, str) and path != "builtin" and (key == "llm_path" or _reads_texts(record)):
            found.append(_base(path, part, key))
    return found


def _reads_texts(record: Mapping[str, Any]) -> bool:
    """Whether the run has a text encoder: the identities of its parts are separated by commas, or are those of one."""
    return ", " in (record.get("backbone_identity") or "") or record["model"] in ("AlphaRec", "NearestTexts")


def _base(path: str, part: str, key: str) -> BaseModel:
    if is_package(path):
        name = distribution_of(path)
        return BaseModel(part, name, False, _of_package(name), key)
    folder = Path(path).expanduser()
    if folder.exists():
        name = base_model_name({"base_model_name_or_path": str(folder.resolve())}) or folder.name
        on_hub = "/" in name  # a snapshot in the hub's cache
        return BaseModel(part, name, on_hub, _of_card(folder / "README.md") or (_of_hub(name) if on_hub else None), key)
    return BaseModel(part, path, True, _of_hub(path), key)


def _of_package(name: str) -> str | None:
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    for key in ("License-Expression", "License"):
        text = found[key] if key in found else ""  # noqa: SIM401 - it is a message of email
        if text and len(text) < 40 and " " not in text:
            return text.lower()
    return None


def _of_card(card: Path) -> str | None:
    """The licence in the metadata of a model card; None if there is none."""
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(card).data.license if card.is_file() else None
    except Exception:  # whatever is wrong with somebody's card, the run can be shared
        return None
    return licence if isinstance(licence, str) else None


def _of_hub(name: str) -> str | None:
    """The licence of a model on the hub: from the cache, or asked; None if that is not possible."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "README.md")
    if isinstance(cached, str) and (licence := _of_card(Path(cached))):
        return licence
    try:
        data = HfApi().model_info(name, timeout=10).card_data
    except Exception:  # offline, renamed, private
        return None
    licence = data.get("license") if data is not None else None
    return licence if isinstance(licence, str) else None
