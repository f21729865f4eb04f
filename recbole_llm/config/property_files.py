"""The files of ``properties/``: their values, and the definitions of keys in their comments."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config

from recbole_llm.config.definitions import Definition, definitions_of
from recbole_llm.config.recbole_keys import RECBOLE_DEFINITIONS
from recbole_llm.config.values import read_arguments
from recbole_llm.store.json_files import read_regular

_MOST = 100_000  # values in a file; a few lines of aliases of aliases stand for billions
_LARGEST = 2**18  # bytes of a file, ten times the largest of ours; some texts cost PyYAML the square of their length
# files that define keys, within the folder
_DEFINING = ("*.yaml", "parts/*.yaml", "model/*.yaml")


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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with RecBole's form of numbers, without keys that are given twice."""

    yaml_implicit_resolvers = Config._build_yaml_loader(None).yaml_implicit_resolvers

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen: set[Hashable] = set()
        for number, key in enumerate(keys):
            if not isinstance(key, Hashable):
                break  # which PyYAML refuses
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key}` is given twice", problem_mark=node.value[number][0].start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a file of ``key: value`` lines; ``1e-4`` is a number, as in RecBole.

    Raises:
        ValueError: the file has another form, or a key twice.
    """
    try:
        values = deepcopy(_parsed(read_regular(Path(file), _LARGEST).decode("utf-8-sig")))
        json.dumps(values, default=str, skipkeys=True)  # an anchor that contains itself is a ValueError
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date such as 2020-13-01
        raise ValueError(f"{file}: not a YAML file ({error})") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{file}: a property file consists of `key: value` lines, not of a {type(values).__name__}")
    return values or {}


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node once each alias is written out; one that stands within itself is counted once."""
    if id(node) not in known:
        known[id(node)] = 1
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] += sum(_written_out(part, known) for part in parts) if isinstance(node, yaml.CollectionNode) else 0
    return known[id(node)]


@lru_cache
def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _written_out(node, {}) > _MOST:
            raise ValueError(f"its aliases stand for more than {_MOST:,} values")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


class PropertyFiles:
    """The property files of ``folder``, by default ``properties/``, and those of the user's model.

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
            extends = extends if isinstance(extends, list) else [extends]
            for other in extends:
                if not (self.folder / f"{other}.yaml").is_file():
                    raise ValueError(f"{file}: extends: {other!r} is no file of {self.folder}; give one as parts/llm is given")
            merged = self.merge(merged, self.read(*extends), values)
        return merged

    def names(self, below: str) -> list[str]:
        """The names of the files in a folder."""
        return sorted(file.stem for file in (self.folder / below).glob("*.yaml"))

    def add(self, name: str, file: Path) -> None:
        """Read ``name`` from a file of the user."""
        self.own[name] = file
        self.__dict__.pop("definitions", None)

    @cached_property
    def definitions(self) -> Mapping[str, Definition]:
        """All defined keys, RecBole's included; inner keys are named as ``candidates.seed``.

        A key that a model of the user defines, too, is what that model says.

        Raises:
            ValueError: a key is defined twice.
        """
        found: dict[str, Definition] = {}
        for file in sorted(file for pattern in _DEFINING for file in self.folder.glob(pattern)):
            for name, definition in _defined(file).items():
                if name in found:
                    raise ValueError(f"{name} is defined in {found[name].file} and in {file}; keep the type in one comment")
                found[name] = definition
        own = [_defined(file) for file in self.own.values()]
        return {**RECBOLE_DEFINITIONS, **found, **{name: one for file in own for name, one in file.items()}}

    def merge(self, *layers: Mapping[Any, Any], key: str = "") -> dict[Any, Any]:
        """Merge values; later ones override earlier ones, and a dictionary overrides only the keys that it names, at any depth.

        A dictionary whose comment says ``replaced as a whole`` is replaced. A text in its place stands for all its keys.

        Args:
            key: the key whose values these are; empty for those of a file.
        """
        merged: dict[Any, Any] = {}
        for layer in layers:
            for name, value in layer.items():
                before, within = merged.get(name), f"{key}.{name}" if key else name
                if (
                    value and isinstance(value, Mapping) and isinstance(before, str)
                ):  # one text for all inner keys, as in eval_args.mode
                    inner = [one for one in self.definitions if one.rpartition(".")[0] == within]
                    before = {one.rpartition(".")[2]: before for one in inner}
                if isinstance(value, Mapping) and isinstance(before, Mapping) and not self._whole(within):
                    merged[name] = self.merge(before, value, key=within)
                else:
                    merged[name] = value
        return merged

    def of_command_line(self, arguments: Iterable[str]) -> dict[str, Any]:
        """The values of a command line, as a run reads them; errors as :func:`~recbole_llm.config.values.read_arguments`."""
        values = read_arguments(arguments)
        return {**values, **self.as_collections(values)}

    def as_collections(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the texts that are lists or dictionaries in YAML, of keys that have such: a shell removes inner quotes.

        So ``--metrics=['NDCG','MRR']``, which arrives as ``[NDCG,MRR]``, is a list, and ``{mode:full}`` is a dictionary.
        """
        found = {}
        for key, text in values.items():
            definition = self.definitions.get(key)
            if not definition or not isinstance(text, str) or (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
                continue
            if any(definition.has(kind) for kind in ("list", "dict", "settings")):
                with suppress(yaml.YAMLError, ValueError, RecursionError):
                    value = deepcopy(_parsed(text))
                    if isinstance(value, dict) and any(entry is None and ":" in str(name) for name, entry in value.items()):
                        value = deepcopy(_parsed(text.replace(":", ": ")))
                    if definition.accepts(value):
                        found[key] = value
        return found

    def _whole(self, key: str) -> bool:
        return key in self.definitions and self.definitions[key].whole

    def own_keys(self) -> set[str]:
        """All keys of the property files of the user's model, those without a type included."""
        return {key for file in self.own.values() for key in read_yaml(file)} - {"extends"}


def _defined(file: Path) -> Mapping[str, Definition]:
    return definitions_of(file.read_text(encoding="utf-8"), file)
