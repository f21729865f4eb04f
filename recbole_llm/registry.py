"""Models by name: the user's own, ours, then RecBole's.

Modules are imported on demand, so that ``--help`` and the classical baselines import neither transformers nor peft.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import inspect
import sysconfig
import traceback
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

MODELS = {
    "ALLMRec": "recbole_llm.model.allmrec",
    "AlphaRec": "recbole_llm.model.alpharec",
    "Cascade": "recbole_llm.model.cascade",
    "Imported": "recbole_llm.model.imported",
    "Laser": "recbole_llm.model.laser",
    "LlamaRec": "recbole_llm.model.llamarec",
    "LoRACocktail": "recbole_llm.model.loracocktail",
    "MoLoRec": "recbole_llm.model.molorec",
    "TALLRec": "recbole_llm.model.tallrec",
    "WeaveRec": "recbole_llm.model.weaverec",
    "RecentPop": "recbole_llm.model.recentpop",
    "TransitionGraph": "recbole_llm.model.transitiongraph",
    "RepeatRule": "recbole_llm.model.repeatrule",
    "NearestTitles": "recbole_llm.model.nearesttitles",
    "NearestTexts": "recbole_llm.model.nearesttexts",
}
SHORTCUTS = ("RecentPop", "TransitionGraph", "RepeatRule", "NearestTitles", "NearestTexts")
"""The models that train nothing; every leaderboard has them."""
SHUFFLED, NO_ADAPTER = "shuffled titles", "no adapter"
"""The names of control rows in the record of a ranker."""

METRICS = {
    "Novelty": "recbole_llm.evaluation.beyond_accuracy",
    "Diversity": "recbole_llm.evaluation.beyond_accuracy",
}

_own: dict[str, type[Any]] = {}


def get_model(name: str) -> type[Any]:
    """The class of a model: a name such as ``SASRec``, or ``package.module:Class`` for a model of the user.

    Raises:
        ValueError: neither this package nor RecBole has the model; names similar ones.
    """
    if ":" in name:
        return _own_model(name)
    if name in _own:
        return _own[name]
    if name in MODELS:
        return getattr(importlib.import_module(MODELS[name]), name)
    check_name(name)  # for an unknown name, RecBole's function imports lightgbm
    from recbole.utils import get_model as recbole_get_model

    return recbole_get_model(name)


def add_metrics() -> None:
    """Add our metrics to RecBole's, which reads its tables when it checks ``metrics``; may run repeatedly."""
    from recbole.evaluator import register

    for name, module in METRICS.items():
        if name.lower() not in register.metrics_dict:
            metric = getattr(importlib.import_module(module), name)
            register.metrics_dict[name.lower()] = metric
            register.metric_information[name.lower()] = metric.metric_need
            register.metric_types[name.lower()] = metric.metric_type


def check_name(name: str) -> None:
    """Refuse an unknown name, as :func:`get_model` does, without importing a model."""
    known = [*MODELS, *_recbole_class_names()]
    if ":" not in name and name not in known:
        by_lower = {model.lower(): model for model in known}
        near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
        raise ValueError(f"--model={name}: no such model. Did you mean {', '.join(near) or ', '.join(MODELS)}?")


def _own_model(name: str) -> type[Any]:
    """Import a model of the user and register it by the name of its class.

    Raises:
        ValueError: there is no such class, a model of this package or of RecBole has the same name, or as :func:`own_module`.
    """
    module_name, _, class_name = name.partition(":")
    if class_name in MODELS or class_name in _recbole_class_names():
        raise ValueError(f"--model={name}: {class_name} is a model of this package or of RecBole; give yours another name")
    found = getattr(own_module(module_name, f"--model={name}"), class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"--model={name}: the module {module_name!r} has no class {class_name!r}")
    _own[class_name] = found
    return found


def dotted(module: str) -> str:
    """The dotted name of a module that may be given by its file, ``my/model.py``."""
    if module.endswith(".py") and not Path(module).is_absolute():
        return ".".join(Path(module).with_suffix("").parts)
    return module


def own_module(name: str, given: str) -> ModuleType:
    """Import a module of the user, ``my.model`` or ``my/model.py``.

    Args:
        given: key and value that name it, for errors.

    Raises:
        ValueError: there is no such module, or its code raises an error, which is named with its line.
    """
    name = dotted(name)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):  # not one that it imports
            raise ValueError(f"{given}: {error}; the module must be on the Python path or in the current folder") from error
        others = ("<frozen", *(sysconfig.get_path(one) for one in ("stdlib", "purelib", "platlib")))
        own = [line for line in traceback.extract_tb(error.__traceback__)[1:] if not line.filename.startswith(others)]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""  # a SyntaxError says it itself
        raise ValueError(f"{given}: {name} cannot be imported: {type(error).__name__}: {error}{where}") from error


def contained(model: type[Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> type[Any] | None:
    """The class of the model that is a part of another one, whose attribute ``contains`` is the key that names it; or None.

    Raises:
        ValueError: as :func:`get_model`, with the key.
    """
    key = getattr(model, "contains", None)
    if key is None:
        return None
    if (name := given.get(key) or defaults.get(key)) is None:
        raise ValueError(f"{key}: {model.__name__} has none; give --{key}=MODEL")
    return _named_by(key, str(name))


def extended(model: type[Any] | None) -> list[str]:
    """The models of this package or of RecBole that a user's model extends and whose settings it so has, the nearest last."""
    if model not in _own.values() or model is None:
        return []
    theirs = [one.__name__ for one in model.__mro__ if one.__module__.startswith("recbole.model.")]
    known = {name for name in theirs if name in _recbole_class_names()}
    known |= {one.__name__ for one in model.__mro__ if MODELS.get(one.__name__) == one.__module__}
    return [one.__name__ for one in reversed(model.__mro__) if one.__name__ in known]


def inner_model(key: str, name: Any) -> type[Any] | None:
    """The class of a user's model that ``key`` names; None for any other value.

    Raises:
        ValueError: as :func:`get_model`, with the key.
    """
    own = isinstance(name, str) and (":" in name or name in _own)
    return _named_by(key, name) if own else None


def _named_by(key: str, name: str) -> type[Any]:
    try:
        return get_model(name)
    except ValueError as error:
        raise ValueError(str(error).replace("--model", f"--{key}")) from error


def own_property_file(model: type[Any]) -> Path | None:
    """The property file of a user's model, ``MyModel.yaml`` in the folder of its module; None if there is none."""
    if model not in _own.values():
        return None
    file = Path(inspect.getfile(model)).with_name(f"{model.__name__}.yaml")
    return file if file.is_file() else None


@lru_cache(maxsize=1024)  # that of a class is parsed, a whole module each time
def source(part: Any) -> str:
    """The code of a class or module; empty if it has no file."""
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return ""


def _recbole_class_names() -> list[str]:
    import recbole

    folder = importlib.resources.files(recbole) / "properties" / "model"
    named = {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}
    return sorted(named - {"lightgbm", "xgboost"} | {"Random"})  # need packages of their own; has no property file
