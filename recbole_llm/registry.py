"""Model name -> model class: the user's own, ours, then RecBole's.

A model file registers nothing by itself; the table below is the whole list, and names are looked up lazily, so that
``--help`` and the classical baselines import neither transformers nor peft.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import inspect
import pkgutil
from pathlib import Path
from typing import Any

MODELS = {
    "ALLMRec": "recbole_llm.model.allmrec",
    "AlphaRec": "recbole_llm.model.alpharec",
    "Laser": "recbole_llm.model.laser",
    "LlamaRec": "recbole_llm.model.llamarec",
    "LoRACocktail": "recbole_llm.model.loracocktail",
    "MoLoRec": "recbole_llm.model.molorec",
    "TALLRec": "recbole_llm.model.tallrec",
    "WeaveRec": "recbole_llm.model.weaverec",
}


_own: dict[str, type[Any]] = {}


def recbole_model_names() -> list[str]:
    """File names (lower case) of the models that RecBole ships, lightgbm and xgboost ones left out."""
    families = ["general", "context_aware", "sequential", "knowledge_aware"]
    names = []
    for family in families:
        package = importlib.import_module(f"recbole.model.{family}_recommender")
        names += [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(names)


def get_model(name: str) -> type[Any]:
    """The class of a model, by its CamelCase name, or of a model of the user's own, by ``package.module:Class``.

    Raises:
        ValueError: no such model, here or in RecBole; names the nearest ones.
    """
    if ":" in name:
        return _own_model(name)
    if name in _own:
        return _own[name]
    if name in MODELS:
        return getattr(importlib.import_module(MODELS[name]), name)
    from recbole.utils import get_model as recbole_get_model

    # asked first: RecBole falls through to lightgbm, which nobody has installed
    if name.lower() in recbole_model_names():
        try:
            return recbole_get_model(name)
        except AttributeError:
            pass  # right letters, wrong case: 'sasrec'
    raise _unknown(name)


def check_name(name: str) -> None:
    """Refuse a name that is no model's, as :func:`get_model` does, without importing any model."""
    if ":" not in name and name not in MODELS and name not in _recbole_class_names():
        raise _unknown(name)


def _own_model(name: str) -> type[Any]:
    """A class of the user's own, which is known by its name from now on.

    Raises:
        ValueError: there is no such module or class, or the class is named like a model that others refer to by name.
    """
    module_name, _, class_name = name.partition(":")
    if class_name in MODELS or class_name in _recbole_class_names():
        raise ValueError(f"--model={name}: {class_name} is a model of this package or of RecBole; give yours another name")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--model={name}: {error}; the module must be on the Python path or in the current folder") from error
    _own[class_name] = found
    return found


def own_property_file(model: type[Any]) -> Path | None:
    """The settings of a user's own model, ``MyModel.yaml`` beside the file of the class; None where there are none."""
    if model not in _own.values():
        return None
    file = Path(inspect.getfile(model)).with_name(f"{model.__name__}.yaml")
    return file if file.is_file() else None


def _unknown(name: str) -> ValueError:
    by_lower = {known.lower(): known for known in [*MODELS, *_recbole_class_names()]}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return ValueError(f"--model={name}: no such model. Did you mean {', '.join(near) or ', '.join(MODELS)}?")


def _recbole_class_names() -> list[str]:
    import recbole

    folder = importlib.resources.files(recbole) / "properties" / "model"
    named = {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}
    return sorted(named - {"lightgbm", "xgboost"} | {"Random"})  # what nobody has installed; a model without settings
