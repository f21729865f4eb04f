"""RecBole's atomic files, read strictly: one reader for ``.inter``, ``.item``, ``.user`` and every other table of a dataset.

The first line is a header of cells ``name:type``, and each further line is a row. A line ends at a line feed; one carriage
return before it belongs to the line end. Empty lines are skipped, and a UTF-8 byte order mark is dropped. A cell is the text
between two separators and is not interpreted: quotation marks, ``NA`` and ``null`` are text. An empty cell is a missing value.
Anything ambiguous raises an :class:`AtomicFileError`.

RecBole reads the same files with pandas. pandas joins lines at an unbalanced quotation mark, reads ``NA`` as missing, treats a
lone carriage return as a line end, and shifts the columns of a file whose lines end in a separator.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TextIO

import numpy as np

from recbole_llm.settings import Settings

TYPES = ("token", "float", "token_seq", "float_seq")
_BLOCK = 1 << 22  # characters that are read at once
_LONGEST = 1 << 24  # characters of a line; a file without line feeds is not read into memory whole
_NUMBER = re.compile(r"(?: *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *)?")  # or an empty cell
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{1,2}:\d\d")
_EXACT = 2.0**53  # a float64 holds each whole number up to here
_MARKS = [
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
]


class AtomicFileError(ValueError):
    """A file of a dataset is malformed or ambiguous; the message names file, line, column, value and remedy, if there are any."""


@dataclass(frozen=True)
class AtomicFormat(Settings):
    """How atomic files are written; RecBole's keys of the same names, and ``encoding``, a codec of Python."""

    field_separator: str = "\t"
    seq_separator: str = " "
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        for key in ("field_separator", "seq_separator"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value or "\n" in value or "\r" in value:
                raise ValueError(f"{key}: {value!r} cannot separate cells; give one or more characters without a line break")
        try:
            "".encode(self.encoding)
        except (LookupError, TypeError, UnicodeError):
            raise ValueError(
                f"encoding: {self.encoding!r} is not an encoding that Python knows, such as utf-8 or latin-1"
            ) from None


class AtomicFile:
    """One atomic file.

    Raises:
        FileNotFoundError: there is no such file.
        AtomicFileError: the file is malformed. Raised by whatever reads that part of it.
    """

    def __init__(self, path: Path, form: AtomicFormat) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"the file {path} does not exist")
        self.path, self.form = path, form

    @cached_property
    def types(self) -> dict[str, str]:
        """Type (:data:`TYPES`) of each column by name, in the order of the file."""
        with self._opened() as file:
            header = self._line(file).removesuffix("\n").removesuffix("\r")
        if not header:
            raise AtomicFileError(f"{self.path}, line 1: there is no header; it has cells such as item_id:token")
        types: dict[str, str] = {}
        for cell in header.split(self.form.field_separator):
            name, _, kind = cell.partition(":")
            if kind not in TYPES or not name or name != name.strip() or not name.isprintable():
                raise AtomicFileError(
                    f"{self.path}, line 1: {_shown(cell)} is not a cell of a header; that is name:type, where type is one of "
                    f"{', '.join(TYPES)}, such as user_id:token or timestamp:float{self._other_separator(header)}"
                )
            if name in types:
                raise AtomicFileError(f"{self.path}, line 1: there are two columns {name!r}; rename or remove one")
            types[name] = kind
        return types

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the line and its cells, for each row."""
        number = 1
        for lines in self._lines():
            for number, line in enumerate(lines, start=number + 1):  # noqa: B020 (goes on in the next block)
                if line:
                    yield number, self._checked(number, line.split(self.form.field_separator))

    def read(self, names: Sequence[str], *, as_text: bool = False) -> dict[str, np.ndarray]:
        """The named columns.

        Returns:
            Of ``float`` a float64 array [R] with NaN for an empty cell; otherwise, and of all columns with ``as_text``, an object
            array [R] of strings. Numbers are checked in either case.
        """
        separator, width, places = self.form.field_separator, len(self.types), [*self.types]
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        shared: dict[str, dict[str, str]] = {name: {} for name in names}
        for lines in self._lines():
            rows = [line for line in lines if line]
            if any(line.count(separator) != width - 1 for line in rows):
                for _ in self.rows():
                    pass  # raises, with the number of the line
            flat = _cells(rows, separator)
            for name in names:
                cells = flat[places.index(name) :: width]
                kind, values = self.types[name], None
                if kind == "float":
                    values = self._floats(name, cells)
                elif kind == "float_seq":
                    self._floats(name, [part for cell in cells for part in cell.split(self.form.seq_separator)])
                elif kind == "token":  # each token once in memory
                    cells = [*map(shared[name].setdefault, cells, cells)]
                found[name].append(np.array(cells, dtype=object) if as_text or values is None else values)
        if names and not sum(map(len, found[names[0]])):
            raise AtomicFileError(f"{self.path} has a header and no rows")
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def error(self, name: str, wrong: Callable[[str], object], reason: str) -> AtomicFileError:
        """The error about the cells of a column that are ``wrong``: the first one with its line, and their number."""
        place, first, count = [*self.types].index(name), (0, ""), 0
        for number, cells in self.rows():
            if wrong(cells[place]):
                first, count = first if count else (number, cells[place]), count + 1
        others = f" ({count} such rows)" if count > 1 else ""
        return AtomicFileError(f"{self.path}, line {first[0]}, column {name}: {_shown(first[1])} {reason}{others}")

    def _floats(self, name: str, cells: list[str]) -> np.ndarray:
        if not all(map(_NUMBER.fullmatch, cells)):
            raise self._not_a_number(name)
        values = np.array([float(cell or "nan") for cell in cells])
        large = np.abs(values) >= _EXACT
        if large.any() and (wrong := [cell for cell, far in zip(cells, large, strict=True) if far and _inexact(cell)]):
            raise self.error(name, lambda cell: wrong[0] in cell, "has more digits than a float64 holds; divide the column")
        return values

    def _not_a_number(self, name: str) -> AtomicFileError:
        parts = self.form.seq_separator if self.types[name] == "float_seq" else None

        def wrong(cell: str) -> bool:
            return not all(map(_NUMBER.fullmatch, cell.split(parts) if parts else [cell]))

        value = next(part for _, cells in self.rows() if wrong(part := cells[[*self.types].index(name)]))
        if _DATE.search(value):
            remedy = "write times as numbers, such as seconds: pd.to_datetime(t).astype('datetime64[s]').astype('int64')"
        else:
            remedy = "write it as 3.5 or 1e-3, leave the cell empty if the value is missing, or change the type in the header"
        return self.error(name, wrong, f"is not a number; {remedy}")

    def _checked(self, number: int, cells: list[str]) -> list[str]:
        width = len(self.types)
        if len(cells) == width:
            return cells
        line = self.form.field_separator.join(cells)
        if len(cells) == width + 1 and not cells[-1]:
            remedy = "remove the separator at the end of the line"
        elif len(cells) > width:
            remedy = f"a value contains {self.form.field_separator!r}, which separates cells; take it out"
        else:
            remedy = f"a missing value is an empty cell, with its separator{self._other_separator(line)}"
        raise AtomicFileError(
            f"{self.path}, line {number}: {len(cells)} cells, but the header has {width} ({', '.join(self.types)}): "
            f"{_shown(line)}; {remedy}"
        )

    def _other_separator(self, line: str) -> str:
        own = self.form.field_separator
        found = next((other for other in ("\t", ",", ";", "|", " ") if other in line and own not in line), None)
        if found:
            return f"; if {found!r} separates the columns, set field_separator to it"
        if "\r" in line:
            return "; if a carriage return alone ends the lines, convert the file: tr '\\r' '\\n'"
        return ""

    def _lines(self) -> Iterator[list[str]]:
        """Blocks of lines after the header."""
        with self._opened() as file:
            self._line(file)
            while block := file.read(_BLOCK) + self._line(file):
                lines = block.split("\n")
                if not lines[-1]:
                    lines.pop()  # after the last line feed
                yield [line.removesuffix("\r") for line in lines] if "\r" in block else lines

    def _line(self, file: TextIO) -> str:
        line = file.readline(_LONGEST)
        if len(line) == _LONGEST and not line.endswith("\n"):
            raise AtomicFileError(
                f"{self.path}: a line has more than {_LONGEST:,} characters; is it a text file with a row in each line?"
            )
        return line

    @contextmanager
    def _opened(self) -> Iterator[TextIO]:
        try:
            with open(self.path, encoding=self._codec, newline="\n") as file:
                yield file
        except UnicodeError as error:
            raise self._undecodable(error) from None

    @cached_property
    def _codec(self) -> str:
        with open(self.path, "rb") as file:
            start = file.read(4)
        codec = codecs.lookup(self.form.encoding).name
        marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
        if marked and not codec.startswith(marked):
            raise AtomicFileError(
                f"{self.path} begins with the byte order mark of {marked}, but encoding is {self.form.encoding}; "
                f"set encoding to {marked}, or convert the file with iconv -t utf-8"
            )
        return "utf-8-sig" if codec == "utf-8" else codec

    def _undecodable(self, error: UnicodeError) -> AtomicFileError:
        """The error with the number of the line, where a line feed is one byte."""
        place = ""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1) if "\n".encode(self.form.encoding) == b"\n" else ():
                try:
                    line.decode(self._codec)
                except UnicodeDecodeError as found:
                    place, error = f", line {number}: {line[max(0, found.start - 20) : found.end + 20]!r}", found
                    break
        return AtomicFileError(
            f"{self.path}{place} is not text in {self.form.encoding} ({error}); "
            "set encoding to that of the file, such as latin-1, or convert the file with iconv -t utf-8"
        )


def _cells(lines: list[str], separator: str) -> list[str]:
    """The cells of all lines in one list."""
    if len(separator) == 1 and lines:
        return separator.join(lines).split(separator)  # a list for each line would keep the garbage collector busy
    return [cell for line in lines for cell in line.split(separator)]


def _inexact(cell: str) -> bool:
    value, digits = float(cell), cell.strip()
    return not np.isfinite(value) or (digits.lstrip("+-").isdigit() and Decimal(value) != Decimal(digits))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
