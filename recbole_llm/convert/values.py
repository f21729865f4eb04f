"""Values as the atomic files hold them: ids, titles, lists of categories, ratings."""

from __future__ import annotations

import ast
import html
import json
import math
import re
from collections.abc import Iterable
from typing import Any

SEPARATOR = "|"
"""Between the values of a list, the ``seq_separator`` of converted datasets."""
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff]+")
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters that were cut, which no file can hold
_LONGEST_LIST = 1 << 16  # characters of a list in a cell
_QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")
_NUMPY = re.compile(r"""\[(?:"[^"]*"|'[^']*')(?:\s+(?:"[^"]*"|'[^']*'))+\s*\]""")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>|<!--.{0,500}?-->")
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+\s*")
_DECIMAL_POINT = re.compile(r"\s*[-+]?\d*\.\d*(?:[eE][-+]?\d+)?\s*")
# code of the web page, in titles of Amazon's releases
_PROGRAM = re.compile(r"var aPageStart|\(new Date\(\)\)\.getTime|\{display: ?none")


def identifier(value: Any) -> str:
    """A user or item id as text; ``""`` for none. A whole number has no decimals, and what does not print is escaped."""
    if value is None or value is True or value is False:
        return ""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else "" if math.isnan(value) else value
    text = str(value).strip()
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def missing(value: Any) -> bool:
    """Whether a cell has no value."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def pointed(value: Any) -> Any:
    """A text such as ``3,5`` with a decimal point; any other value as it is."""
    return value.replace(",", ".") if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value) else value


class Decimals:
    """The numbers of a column, written with decimal points or, all of them, with decimal commas.

    Attributes:
        found: how many values have a decimal comma.
        first: the first of them.
    """

    def __init__(self) -> None:
        self._point, self.found, self.first = "", 0, ""

    def read(self, value: Any) -> Any:
        """The value, with a decimal point if it is a text.

        Raises:
            ValueError: it has a comma where an earlier one has a point, or a point where an earlier one has a comma.
        """
        if not isinstance(value, str):
            return value
        if "," not in value:
            if "." in value and (self.found or not self._point) and _DECIMAL_POINT.fullmatch(value):
                if self.found:
                    raise ValueError(f"has a decimal point, but {self.first!r} above a comma; write all numbers in one way")
                self._point = value
            return value
        found = pointed(value)
        if found is value:
            return value
        if self._point:
            raise ValueError(f"has a decimal comma, but {self._point!r} above a point; write all numbers in one way")
        self.found, self.first = self.found + 1, self.first or value
        return found


def number(value: Any) -> float:
    """A number.

    Raises:
        ValueError: it is none, or not a finite one.
    """
    try:
        found = float(value)
    except ValueError:
        if pointed(value) is not value:
            remedy = "write decimals with a point, or save the table with semicolons or tabs between its cells"
            raise ValueError(f"is not a number; {remedy}") from None
        raise
    if not math.isfinite(found):
        raise ValueError
    return found


def clean(value: Any) -> str:
    """A text in one line, without HTML tags and with the characters that HTML's entities stand for; of a list, its texts."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(filter(None, map(clean, value)))
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.15g}"
    text = str(value)
    if "&" in text:
        text = html.unescape(html.unescape(text))  # releases have "&amp;amp;"
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = _BLANK.sub(" ", _SURROGATES.sub("", text)).strip()
    return "" if _PROGRAM.search(text) else text


def parts(value: Any, separator: str | None) -> list[str]:
    """The different texts of a list, of lists of lists, or of a text between separators (None: of one value)."""
    if isinstance(value, (list, tuple)):
        found: Iterable[str] = (text for one in value for text in parts(one, None))
    elif isinstance(value, dict) and "name" in value:  # {"id": 16, "name": "Animation"}
        found = [clean(value["name"])]
    elif (own := listed(value)) is not value:
        return parts(own, None)
    elif separator is None or value is None:
        found = [clean(value)]
    else:
        found = map(clean, str(value).split(separator))
    return [*dict.fromkeys(text.replace(SEPARATOR, "/") for text in found if text)]


def listed(value: Any) -> Any:
    """The list that a text writes as JSON, as Python or as numpy does; any other value as it is."""
    if not isinstance(value, str) or value[:1] != "[" or len(value) > _LONGEST_LIST:
        return value
    if _NUMPY.fullmatch(value):  # which Python reads as one text
        return [double or single for double, single in _QUOTED.findall(value)]
    for read in (json.loads, ast.literal_eval):  # no code is run
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else value
    return value


def list_separator(name: str, samples: Iterable[Any]) -> str | None:
    """What separates the values in a column of texts: ``|`` or ``;`` if it has some, a comma if its name is a plural."""
    texts = [text for text in samples if isinstance(text, str)]
    for mark in ("|", ";"):
        if any(mark in text for text in texts):
            return mark
    return "," if name.casefold().endswith("s") and any("," in text and text[:1] != "[" for text in texts) else None


def shown(value: Any, width: int = 80) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
