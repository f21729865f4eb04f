"""Checks a user's values against the definitions of keys, and raises the errors of wrong ones.

Each value is checked alone. The parts that read several values check whether they fit together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Real
from typing import Any

from recbole_llm import registry
from recbole_llm.config.definitions import Definition
from recbole_llm.config.property_files import PropertyFiles
from recbole_llm.config.recbole_keys import MODEL_KEYS, RECBOLE_DEFINITIONS, SUCCESSORS


def check(
    values: Mapping[Any, Any],
    source: str,
    files: PropertyFiles,
    defaults: Mapping[str, Any],
    *,
    near: Collection[str] | None = None,
    inner: Mapping[str, PropertyFiles] | None = None,
) -> None:
    """Check keys and values of a user, inner ones of dictionaries included.

    Keys of other models are checked, too, and may stand there, as a file may serve several models (:func:`unread`).

    Args:
        source: the file or argument that the values come from.
        defaults: the run's default values, RecBole's included.
        near: keys among which a misspelt one is sought first; None for those of the run.
        inner: by key with settings of a user's model, the files that define them.

    Raises:
        ValueError: names key, value, source, what is allowed and the nearest key, or the default.
    """
    definitions, own = files.definitions, files.own_keys()
    for key, value in values.items():
        if key in definitions:
            _check_value(key, value, source, definitions, defaults.get(key))
            for name, settings in _settings_in(key, value, definitions[key]):
                of_recbole = RECBOLE_DEFINITIONS if name == key else near  # cf_config: keys of another model
                check(settings, f"{name} of {source}", (inner or {}).get(key, files), defaults, near=of_recbole)
        elif key not in own:
            nearest = _nearest(str(key), definitions, defaults if near is None else near)
            raise ValueError(f"unknown key `{key}` in {source}; {nearest}")


def unread(
    given: Sequence[tuple[str, Mapping[str, Any]]],
    files: PropertyFiles,
    defaults: Mapping[str, Any],
    model: type[Any],
    of_lms: Collection[str] = (),
) -> dict[str, str]:
    """The given settings of models that the run's model does not have, so that they change nothing, with their sources.

    Args:
        given: the sources with their values.
        defaults: the run's default values, RecBole's included, in which nearly every setting of its model stands.
        model: its class.
        of_lms: keys that all models of this package share and RecBole's own do not read, though they have defaults.
    """
    folders = {files.folder / "model", files.folder / "parts"}
    ours = {key for key, one in files.definitions.items() if one.file.parent in folders}
    foreign = of_lms if model.__module__.startswith("recbole.") else ()
    keys = {key: source for source, values in given for key in values}
    found = {key: source for key, source in keys.items() if key in foreign or (key in ours | MODEL_KEYS and key not in defaults)}
    code = _code(model, keys) if found else ""
    return {key: source for key, source in found.items() if not re.search(rf"config\[\s*[\"']{key}[\"']\s*\]", code)}


_OF_RECBOLES_TRAINER = {  # and how keys of a stage end that say the same
    "epochs": "_epochs",
    "learning_rate": "_learning_rate",
    "train_batch_size": "_batch_size",
    "weight_decay": "_weight_decay",
    "eval_step": "_eval_steps",
    "stopping_step": "_patience",
    "clip_grad_norm": "max_grad_norm",
    **dict.fromkeys(("learner", "train_neg_sample_args", "loss_decimal_place", "enable_amp", "enable_scaler"), ""),
}


def of_other_training(
    given: Sequence[tuple[str, Mapping[str, Any]]], defaults: Mapping[str, Any], model: type[Any], own: Collection[str]
) -> dict[str, list[str]]:
    """The given settings of RecBole's trainer, if the model is trained in stages and so without it, with those of its stages.

    Other arguments as in :func:`unread`.

    Args:
        own: the keys of the model's property file, which it reads itself, as Laser its ``weight_decay``.
    """
    if not getattr(model, "trained_in_stages", False):
        return {}
    trains = model.has_validation and not getattr(model, "shortcut", False)
    ours = [key for key in defaults if key not in RECBOLE_DEFINITIONS and trains]
    if "adapters" not in own:  # parts/adapters: the others train no LoRA
        ours = [key for key in ours if not key.startswith("lora_")]
    keys = [key for key in _OF_RECBOLES_TRAINER if key not in own and any(key in values for _, values in given)]
    return {key: [one for one in ours if (end := _OF_RECBOLES_TRAINER[key]) and one.endswith(end)] for key in keys}


def _code(model: type[Any], given: Collection[str]) -> str:
    """The code of RecBole or of the user that reads the settings of a model: some have no default in a property file."""
    import recbole.data.transform
    from recbole.model import abstract_recommender
    from recbole.trainer import trainer
    from recbole.utils import get_trainer

    parts: list[Any] = [recbole.data.transform] if "transform" in given else []
    for base in (*model.__mro__, *get_trainer(model.type, model.__name__).__mro__):
        module = sys.modules[base.__module__]
        other = module.__name__.partition(".")[0] in ("builtins", "torch", "recbole_llm")
        if not other and base not in (trainer.Trainer, trainer.AbstractTrainer):
            parts.append(base if module in (abstract_recommender, trainer) else module)  # files of several models' classes
    return "\n".join(map(registry.source, parts))


def source_of(given: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> str:
    """`` in FILE``, the last of the sources that gives a key; empty for a default."""
    sources = [source for source, values in given if key in values]
    return f" in {sources[-1]}" if sources else ""


@contextmanager
def naming_source(given: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[None]:
    """Add to a ValueError the last source of the key that it begins with; ``given`` holds the sources with their values."""
    try:
        yield
    except ValueError as error:
        key = str(error).partition(":")[0]
        sources = [source for source, values in given if key in values]
        if not sources or sources[-1] in str(error):
            raise
        raise ValueError(f"{error} ({key} is given in {sources[-1]})") from error


def _settings_in(key: str, value: Any, definition: Definition) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The dictionaries of settings in a value, by name."""
    for one in definition.types if isinstance(value, Mapping) else ():
        if one.kind == "settings":
            yield key, value
        elif any(entry.kind == "settings" for entry in one.entries):
            yield from ((f"{key}[{name!r}]", settings) for name, settings in value.items())


def _check_value(
    key: str, value: Any, source: str, definitions: Mapping[str, Definition], default: Any, *, merged: bool = True
) -> None:
    """``merged``: the default holds if the value is removed, as in a dictionary that is merged into the default one."""
    definition = definitions[key]
    if not definition.accepts(value):
        raise ValueError(f"{key}: {_shown(value)} in {source} is not {definition}; {_remedy(value, definition, default, merged)}")
    if not isinstance(value, Mapping) or not (inner := [name for name in definitions if name.rpartition(".")[0] == key]):
        return
    for name, entry in value.items():
        if f"{key}.{name}" not in inner:
            known = [other.rpartition(".")[2] for other in inner]
            near = (get_close_matches(str(name), known, n=1, cutoff=0.0) or known)[0]
            raise ValueError(f"unknown key `{name}` of {key} in {source}; did you mean `{near}`? Known: {', '.join(known)}")
        usual = default.get(name) if isinstance(default, Mapping) else None
        _check_value(f"{key}.{name}", entry, source, definitions, usual, merged=not definition.whole)


def _remedy(value: Any, definition: Definition, default: Any, merged: bool) -> str:
    if isinstance(value, str) and definition.has("list") and not definition.choices:
        return f"give [{value!r}]"
    if isinstance(value, str) and (near := get_close_matches(value, definition.choices, n=1)):
        return f"did you mean {near[0]!r}?"
    if isinstance(value, str) and (number := _number(value)) is not None and definition.accepts(number):
        return f"give {number} without quotes"
    if isinstance(value, Real) and definition.accepts(str(value)):
        return f"put quotes around it: \"'{value}'\" on a command line, '{value}' in a file"
    if isinstance(value, float) and value.is_integer() and definition.accepts(int(value)):
        return f"give {int(value)}"
    for one in definition.types:
        for name, entry in one.wrong_entries(value):
            near = get_close_matches(str(entry), [choice for inner in one.entries for choice in inner.choices], n=1)
            return f"change {'' if name is None else f'{name}: '}{_shown(entry)}{f' to {near[0]!r}' if near else ''}"
    if not merged and default is not None and definition.accepts(default):
        return f"give {_shown(default)}, for example"
    if definition.accepts(default):
        return f"remove it to use the default, {'~' if default is None else _shown(default)}"
    return "remove it"


def _number(text: str) -> float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _shown(value: Any, width: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _nearest(key: str, definitions: Collection[str], first: Collection[str]) -> str:
    """The successor of an old key, or the nearest key, preferably of ``first``; inner keys are compared without their prefix."""
    if key in SUCCESSORS:
        return f"RecBole 1.2 has none of this name; {SUCCESSORS[key]}"
    here = [name for name in definitions if name.partition(".")[0] in first]
    for pool in (here, definitions):
        names: dict[str, str] = {}
        for name in sorted(pool, key=lambda name: (name.count("."), name)):
            names.setdefault(name.rpartition(".")[2], name)
        longer = [name for name in names if key.endswith(f"_{name}")]  # torch_dtype, an old name of Hugging Face
        for near in get_close_matches(key, names, n=1, cutoff=0.7) or longer[:1]:
            outer, _, inner = names[near].rpartition(".")
            return f"did you mean `{inner}`{f' of `{outer}`' if outer else ''}?"
    return "see properties/ and RecBole's documentation"
