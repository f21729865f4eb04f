"""The typed comments that define keys, and which values a type accepts; the grammar is in ``properties/README.md``::

train_samples: ~            # (int) training examples of an adapter; ~ takes all
lora_dropout: 0.05          # (float in [0, 1)) share of inputs that is dropped
target_modules: all-linear  # (str) or (list of str) the layers that are adapted
merge_split: valid          # (str in valid, test) whose prompts

"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_INTERVAL = r"[\[(][^\[\]()]*[\])]"
_KIND = rf"\w+(?: >=? -?[\d.]+| in {_INTERVAL}| in (?:(?! or )[^()\[\]])+)?"
_TYPE = rf"\((?:(?:list|dict) of {_KIND}(?: or {_KIND})*|{_KIND})\)"
_TYPES = re.compile(rf"{_TYPE}(?: or {_TYPE})*")
_LINE = re.compile(r"^( *)(# )?(\w+):(?:(.*) # (\(.*)|.*)$")
_NUMBER = r"[-+]?(?:inf|\d+(?:\.\d*)?|\.\d+)"
_PARTS = re.compile(rf"\s*([\[(])\s*({_NUMBER})\s*,\s*({_NUMBER})\s*([\])])\s*")

_CLASSES: Mapping[str, Any] = {"str": (str, os.PathLike), "list": (list, tuple), "dict": Mapping, "settings": Mapping}
_WORDS = {
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "str": ("a string", "strings"),
    "interval": ("an interval such as '[5,inf)'", "intervals such as '[5,inf)'"),
    "list": ("a list", "lists"),
    "dict": ("a dictionary", "dictionaries"),
    "settings": ("a dictionary of settings", "dictionaries of settings"),
    "bool": ("True or False", "True or False"),
}


@dataclass(frozen=True)
class Interval:
    """A range of numbers, written as in mathematics: ``[0, 1)`` contains 0 and not 1."""

    low: float
    high: float
    closed: tuple[bool, bool]

    @classmethod
    def read(cls, text: str) -> Interval:
        """Raises ValueError if ``text`` is not an interval, or an empty one such as ``(1, 0)``."""
        if not (parts := _PARTS.fullmatch(text)):
            raise ValueError(f"{text!r} is not an interval such as '[5,inf)'")
        left, low, high, right = parts.groups()
        found = cls(float(low), float(high), (left == "[", right == "]"))
        if found.low > found.high or (found.low == found.high and found.closed != (True, True)):
            raise ValueError(f"{text!r} contains no number")
        return found

    def __contains__(self, number: Any) -> bool:
        above = number >= self.low if self.closed[0] else number > self.low
        return above and (number <= self.high if self.closed[1] else number < self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'of at least' if self.closed[0] else 'above'} {self.low:.10g}"
        return f"in {'(['[self.closed[0]]}{self.low:.10g}, {self.high:.10g}{')]'[self.closed[1]]}"


_COUNT = Interval(1, math.inf, (True, False))


@dataclass(frozen=True)
class Type:
    """One type of a comment.

    Attributes:
        kind: a key of ``_WORDS``.
        range: of a number; whole numbers are at least 1 if the comment gives none.
        choices: of a string; an ``N`` at the end of a choice stands for a whole number of at least 1.
        entries: types of the entries of a list, or of the values of a dictionary; any if there is none.
    """

    kind: str
    range: Interval | None = None
    choices: tuple[str, ...] = ()
    entries: tuple[Type, ...] = ()

    @classmethod
    def read(cls, text: str) -> Type:
        """The type that a comment gives in brackets, as ``(float in [0, 1))``. Raises ValueError for an unknown kind."""
        outer, _, inner = text[1:-1].partition(" of ")
        if inner:
            return cls(outer, entries=tuple(cls.read(f"({one})") for one in inner.split(" or ")))
        kind, _, limit = text[1:-1].partition(" ")
        if kind not in _WORDS:
            raise ValueError(f"{text}: there is no type {kind!r}; known: {', '.join(_WORDS)}")
        if limit.startswith(">"):
            sign, number = limit.split()
            return cls(kind, Interval(float(number), math.inf, (sign == ">=", False)))
        if limit and kind in ("int", "float"):
            return cls(kind, Interval.read(limit.removeprefix("in ")))
        return cls(kind, _COUNT if kind == "int" else None, tuple(re.split(", *", limit.removeprefix("in "))) if limit else ())

    def accepts(self, value: Any) -> bool:
        """Whether a value is of this type; True and False are not numbers."""
        if isinstance(value, bool) or self.kind == "bool":
            return isinstance(value, bool) and self.kind == "bool"
        if self.kind in ("int", "float"):
            if not isinstance(value, Integral if self.kind == "int" else Real):
                return False
            finite = abs(value) < 2**63  # type: ignore[operator]  # not nan, either
            return finite and (self.range is None or value in self.range)
        if self.kind == "interval":
            # a command line reads [5, 30] as a list, and RecBole reads the text of a list
            return isinstance(value, (str, list, tuple)) and all(map(_is_interval, str(value).split(";")))
        if not isinstance(value, _CLASSES[self.kind]):
            return False
        if self.choices:
            return any(re.fullmatch(re.sub("N$", "[1-9][0-9]{0,8}", re.escape(choice)), str(value)) for choice in self.choices)
        return not self.wrong_entries(value)

    def wrong_entries(self, value: Any) -> list[tuple[Any, Any]]:
        """Name (None in a list) and value of each entry of a list or dictionary that this type refuses; none of other values."""
        if not self.entries or not isinstance(value, _CLASSES[self.kind]):
            return []
        named = value.items() if isinstance(value, Mapping) else ((None, entry) for entry in value)
        return [(name, entry) for name, entry in named if not any(one.accepts(entry) for one in self.entries)]

    def words(self, *, several: bool = False) -> str:
        """The type in words, for one value or for several."""
        word = _WORDS[self.kind][several]
        if self.choices:
            return f"{f'{word} of' if several else 'one of'} {', '.join(self.choices)}"
        if self.entries:
            return f"{word} of {' or '.join(one.words(several=True) for one in self.entries)}"
        return f"{word} {self.range}" if self.range else word


def _is_interval(text: str) -> bool:
    try:
        return bool(Interval.read(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Definition:
    """What a comment says of a key.

    Attributes:
        types: the value has one of them.
        optional: None is accepted too.
        whole: a dictionary that replaces an earlier one, and is not merged into it.
        file: where the comment stands.
    """

    types: tuple[Type, ...]
    optional: bool
    whole: bool
    file: Path

    @classmethod
    def read(cls, comment: str, file: Path, default: str = "") -> Definition | None:
        """The definition in a comment, ``(type) or (type) meaning``; None if it does not start with a type."""
        if not (types := _TYPES.match(comment)):
            return None
        found = tuple(Type.read(text) for text in re.findall(_TYPE, types[0]))
        text = comment[types.end() :]
        # a command line reads none as None, also where it is a choice
        optional = "~" in text or default.rstrip().endswith("~") or any("none" in one.choices for one in found)
        return cls(found, optional, "replaced as a whole" in text, file)

    def accepts(self, value: Any) -> bool:
        """Whether a value has one of the types."""
        return self.optional if value is None else any(one.accepts(value) for one in self.types)

    def has(self, kind: str) -> bool:
        """Whether one of the types is of this kind."""
        return any(one.kind == kind for one in self.types)

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices of all types."""
        return tuple(choice for one in self.types for choice in one.choices)

    def __str__(self) -> str:
        return " or ".join([*(one.words() for one in self.types), *["~"] * self.optional])


@lru_cache
def definitions_of(text: str, file: Path) -> Mapping[str, Definition]:
    """The definitions of a property file; inner keys are named as ``candidates.seed``.

    A line that is commented out defines a key without a default: ``# RS: [0.8, 0.1, 0.1]  # (list of float)``.

    Raises:
        ValueError: a type is unknown, or a key is defined twice.
    """
    found: dict[str, Definition] = {}
    for name, default, comment in _keys(text):
        if definition := Definition.read(comment, file, default):
            if name in found:
                raise ValueError(f"{name} is defined twice in {file}; keep the type in one comment")
            found[name] = definition
    return found


def _keys(text: str) -> Iterator[tuple[str, str, str]]:
    """The keys of a file with the text of their value and comment."""
    outer: list[tuple[int, str]] = []
    for line in text.splitlines():
        if not (match := _LINE.match(line)):
            continue
        indent, commented_out, key, default, comment = match.groups()
        if commented_out and not _TYPES.match(comment or ""):
            continue  # prose
        outer = [(depth, name) for depth, name in outer if depth < len(indent)]
        outer.append((len(indent), key))
        yield ".".join(name for _, name in outer), default or "", comment or ""
