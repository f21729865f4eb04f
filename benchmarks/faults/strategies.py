"""Strategies of hypothesis for hostile inputs: sound ones that were changed, pieces of a syntax, texts, numbers, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Kind = tuple[st.SearchStrategy[Any], Callable[[Any], Any]]

ODD_TEXTS = [
    "",
    " ",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "\0",
    "é",
    "\u202e",
    "NaN",
    "1e999",
    "-1",
    "[" * 3000,
    "x" * 100_000,
]
ODD_TEXTS += ["=1+1", "<script>", "{{ 1 }}", "%s", "\n", "\t", "\ud7ff", "null", "~", "1" * 5000, "__import__('os').system('id')"]
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=30))
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
cuts = st.tuples(st.sampled_from(["cut", "insert", "replace", "twice"]), st.floats(0, 1), st.binary(max_size=40))


def changed(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes after some edits."""
    for how, where, given in edits:
        at = int(where * len(data))
        data = {
            "cut": data[:at],
            "insert": data[:at] + given + data[at:],
            "replace": data[:at] + given + data[at + len(given) :],
            "twice": data[:at] + data,
        }[how]
    return data


def bytes_like(data: bytes) -> st.SearchStrategy[bytes]:
    """A file after none to three edits, or bytes of no sort."""
    return st.one_of(st.lists(cuts, max_size=3).map(lambda edits: changed(data, edits)), st.binary(max_size=200))


@st.composite
def objects_like(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value of which one to three parts, at any depth, are replaced, removed or added."""
    found = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = found, None, None
        for _ in range(draw(st.integers(0, 4))):
            if isinstance(place, dict) and place:
                parent, key = place, draw(st.sampled_from(sorted(place)))
            elif isinstance(place, list) and place:
                parent, key = place, draw(st.integers(0, len(place) - 1))
            else:
                break
            place = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(place, dict):
            place[draw(texts)] = draw(values)
        elif parent is None:
            found = draw(values) if how == "replace" else found
        elif how == "remove":
            parent.pop(key)
        else:
            parent[key] = draw(values)
    return found


def fragments(*parts: str) -> st.SearchStrategy[str]:
    """Texts of pieces of a syntax."""
    return st.lists(st.one_of(st.sampled_from(parts), texts), max_size=12).map("".join)


def written(file: Path, content: bytes | str) -> Path:
    """A file with a content, in its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return file
