"""The files of ``properties/``, and the checks of a user's values against them.

A key is defined once, where its comment begins with a type (``properties/README.md``)::

    train_samples: ~            # (int) training examples of an adapter; ~ takes all
    lora_patience: 0            # (int >= 0) validations without a gain before training stops
    target_modules: all-linear  # (str) or (list) the layers that are adapted

:func:`check` compares a value with that type. A dictionary whose inner keys are defined accepts no others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config
from recbole.utils.argument_list import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

from recbole_llm.config.key_groups import RECBOLE_KEYS

# dictionaries that are replaced as a whole and not merged
_WHOLE = ("load_col", "unload_col", "slices", "merge_beside")
# folders and files whose keys are not settings of a run
_NO_SETTINGS = ("leaderboard", "splits", "url.yaml", "kg_url.yaml")

_TYPE = r"\((?:int|float|str|list|dict|bool)(?: >= 0)?\)"
_DEFINITION = re.compile(rf"^( *)(\w+):.* # ({_TYPE}(?: or {_TYPE})*)(.*)$")
_CLASSES = {"int": int, "float": (int, float), "str": (str, os.PathLike), "list": (list, tuple), "dict": dict, "bool": bool}
_WORDS = {
    "int": "a whole number of at least 1",
    "int >= 0": "a whole number of at least 0",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "dict": "a dictionary",
    "bool": "True or False",
}


def properties_folder() -> Path:
    """``properties/``: in the package of a wheel, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise FileNotFoundError(f"properties/overall.yaml was not found in {package} or {package.parent}; reinstall recbole-llm")


def property_file(given: str | Path, key: str = "--config_files") -> Path:
    """The file that the user names with ``key``; ``properties/...`` may also be a file of the package.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for file in (Path(given), properties_folder().parent / given):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{key}: {given} does not exist (current folder: {Path.cwd()})")


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a file of ``key: value`` lines; ``1e-4`` is a number, as in RecBole.

    Raises:
        ValueError: the file has another form.
    """
    try:
        values = deepcopy(_parsed(Path(file).read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not a YAML file ({error})") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{file}: a property file consists of `key: value` lines, not of a {type(values).__name__}")
    return values or {}


@lru_cache
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=Config._build_yaml_loader(None))


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge values; later ones override earlier ones, and a dictionary overrides only the keys that it names."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            partial = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in _WHOLE
            merged[key] = {**merged[key], **value} if partial else value
    return merged


@dataclass(frozen=True)
class Definition:
    """The types of a key, which its comment in ``file`` gives as keys of ``_WORDS``; ``optional`` accepts None too."""

    file: Path
    types: tuple[str, ...]
    optional: bool

    def accepts(self, value: Any) -> bool:
        return self.optional if value is None else any(_is(value, name) for name in self.types)

    def __str__(self) -> str:
        return " or ".join([*(_WORDS[name] for name in self.types), *["~"] * self.optional])


def _is(value: Any, name: str) -> bool:
    kind, _, least = name.partition(" >= ")
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, _CLASSES[kind]) and (kind != "int" or value >= int(least or 1))  # type: ignore[arg-type]


class PropertyFiles:
    """The property files of ``folder``, by default ``properties/``.

    Attributes:
        own: additional files of the user by the name under which they are read, such as ``model/MyModel``.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or properties_folder()
        self.own: dict[str, Path] = {}

    def read(self, *names: str) -> dict[str, Any]:
        """Merge the values of files, named by path without ``.yaml``, and of those they ``extend``; missing files are skipped."""
        merged: dict[str, Any] = {}
        for name in names:
            file = self.own.get(name, self.folder / f"{name}.yaml")
            values = read_yaml(file) if file.is_file() else {}
            extends = values.pop("extends", [])
            merged = merge(merged, self.read(*([extends] if isinstance(extends, str) else extends)), values)
        return merged

    def names(self, below: str) -> list[str]:
        """The names of the files in a folder."""
        return sorted(file.stem for file in (self.folder / below).glob("*.yaml"))

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        """All defined keys; inner keys are named as ``candidates.seed``.

        Raises:
            ValueError: a key is defined twice.
        """
        found: dict[str, Definition] = {}
        files = [file for pattern in ("*.yaml", "parts/*.yaml", "model/*.yaml") for file in self.folder.glob(pattern)]
        for file in [*sorted(files), *self.own.values()]:
            outer = ""
            for line in file.read_text(encoding="utf-8").splitlines():
                if re.match(r"\w+:", line):
                    outer = line.partition(":")[0]
                match = _DEFINITION.match(line)
                if not match:
                    continue
                indent, key, types, text = match.groups()
                key = f"{outer}.{key}" if indent else key
                if key in found:
                    raise ValueError(f"{key} is defined in {found[key].file} and in {file}; keep the type in one comment")
                optional = "~" in text or line.split("#")[0].rstrip().endswith("~")
                found[key] = Definition(file, tuple(re.findall(r"\(([a-z]+(?: >= 0)?)\)", types)), optional)
        return found

    def inner_keys(self, key: str) -> list[str]:
        """The defined keys of a dictionary."""
        return [name.partition(".")[2] for name in self.definitions if name.startswith(f"{key}.")]

    def all_keys(self) -> set[str]:
        """All keys of our property files and RecBole's, for any model."""
        import recbole

        folders = (self.folder, Path(recbole.__file__).parent / "properties")
        files = [file for folder in folders for file in folder.rglob("*.yaml") if not set(file.parts[-2:]) & set(_NO_SETTINGS)]
        files += self.own.values()
        return {key for file in files for key in re.findall(r"(?m)^(\w+):", file.read_text(encoding="utf-8"))} - {"extends"}


def check(values: Mapping[str, Any], source: str, files: PropertyFiles, defaults: Mapping[str, Any]) -> None:
    """Check the types and the inner keys of a user's values.

    Args:
        source: the file or argument that the values come from.
        defaults: the run's default values; other keys belong to other models and are not checked.

    Raises:
        ValueError: names key, value, source and remedy.
    """
    for key, value in values.items():
        if key in files.definitions and key in defaults:
            _check_value(key, value, source, files.definitions[key], defaults[key])
            inner = files.inner_keys(key)
            for name, entry in value.items() if inner and isinstance(value, dict) else ():
                if name not in inner:
                    near = (get_close_matches(str(name), inner, n=1, cutoff=0.0) or inner)[0]
                    raise ValueError(
                        f"unknown key `{name}` of {key} in {source}; did you mean `{near}`? Known: {', '.join(inner)}"
                    )
                default = (defaults[key] or {}).get(name)
                _check_value(f"{key}.{name}", entry, source, files.definitions[f"{key}.{name}"], default)


def _check_value(key: str, value: Any, source: str, definition: Definition, default: Any) -> None:
    if definition.accepts(value):
        return
    remedy = f"remove it to use the default, {'~' if default is None else repr(default)}"
    if "list" in definition.types and isinstance(value, str):
        remedy = f"give [{value!r}]"
    elif "str" in definition.types and isinstance(value, (int, float)):
        remedy = f"put quotes around it: \"'{value}'\" on a command line, '{value}' in a file"
    raise ValueError(f"{key}: {value!r} in {source} is not {definition}; {remedy}")


def check_known(values: Mapping[str, Any], source: str, files: PropertyFiles, defaults: Mapping[str, Any]) -> None:
    """Refuse keys that no model has, and strings for RecBole's numbers; keys of other models pass, as a file may serve several.

    Args:
        defaults: the run's default values, RecBole's included.

    Raises:
        ValueError: names key and source, and the nearest key, preferably of this run, or the default.
    """
    here = {*defaults, *RECBOLE_KEYS, *general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments}
    for key, value in values.items():
        if isinstance(value, str) and type(defaults.get(key)) in (int, float) and key not in files.definitions:
            raise ValueError(f"{key}: {value!r} in {source} is not a number; remove it to use the default, {defaults[key]}")
        if key not in here and key not in (known := files.all_keys()):
            inner = {name for name in files.definitions if name.partition(".")[0] in here}
            raise ValueError(f"unknown key `{key}` in {source}; {_nearest(key, here | inner, known)}")


def _nearest(key: str, *pools: Collection[str]) -> str:
    """Suggest the nearest key of the first pool that has a similar one; inner keys are compared without their prefix."""
    for pool in pools:
        names: dict[str, str] = {}
        for name in sorted(pool, key=lambda name: (name.count("."), name)):
            names.setdefault(name.rpartition(".")[2], name)
        for near in get_close_matches(key, names, n=1, cutoff=0.7):
            outer, _, inner = names[near].rpartition(".")
            return f"did you mean `{inner}`{f' of `{outer}`' if outer else ''}?"
    return "see properties/ and RecBole's documentation"
