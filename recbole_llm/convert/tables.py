"""Tables as streams of rows: CSV and TSV, lines without quoting, JSON lines (also of Python literals), Parquet.

A table never holds more than a block of rows. Every row comes with the number of its line, or of its row in a Parquet file.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from recbole_llm.convert.sources import LONGEST, SUFFIXES, ConversionError, Source

_SAMPLE = 100  # lines whose keys are the columns of JSON lines
_LITERAL = 1 << 22  # characters of a line that is read as a Python literal, at most


class Table(ABC):
    """A table.

    Attributes:
        names: of the columns, in the order of the file.
        shown: the file in messages.
        encoding: of a file of text; else empty.
        decimal_commas: whether commas separate no cells, so that one may be that of a number.
    """

    names: list[str]
    shown: str
    encoding: str = "utf-8"
    decimal_commas: bool = False

    @abstractmethod
    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Number and the values of the named columns, for each row; None for a value that is missing.

        Raises:
            ConversionError: a row is malformed.
        """

    def sample(self, names: Sequence[str], size: int = 1000) -> list[Sequence[Any]]:
        """The named columns of the first rows."""
        return [values for _, values in itertools.islice(self.rows(names), size)]


class Delimited(Table):
    """CSV or TSV with quotation marks as in RFC 4180; without a header, the columns are ``1``, ``2``, ...

    Attributes:
        first: its first line.
    """

    def __init__(self, source: Source, name: str, encoding: str, *, names: Sequence[str] = (), separator: str = "") -> None:
        self._source, self._name, self.encoding, self.shown = source, name, encoding, source.shown(name)
        first = next((line for _, line in source.lines(name, encoding)), "")
        if not first.strip():
            raise ConversionError(f"{self.shown}, line 1: the file has no header; is it empty?")
        self._separator = separator or max("\t,;|", key=first.count)
        self.decimal_commas = self._separator != ","
        self.first = first
        try:
            cells = [cell.strip() for cell in next(csv.reader([first], delimiter=self._separator))]
        except csv.Error:
            raise ConversionError(
                f"{self.shown}, line 1: carriage returns alone end its lines; convert the file: tr '\\r' '\\n'"
            ) from None
        self._header = not names and not any(_is_number(cell) for cell in cells if cell)
        headings = [cell or f"column {place}" for place, cell in enumerate(cells, start=1)]
        self.names = [*names] or (headings if self._header else [str(place) for place in range(1, len(cells) + 1)])
        twice = next((one for one in self.names if self.names.count(one) > 1), None)
        if twice is not None:
            raise ConversionError(f"{self.shown}, line 1: two columns are called {twice!r}; rename one")
        self.has_header = bool(names) or self._header

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        csv.field_size_limit(LONGEST)
        places, width = [self.names.index(name) for name in names], len(self.names)
        lines = (line for _, line in self._source.lines(self._name, self.encoding))
        reader = csv.reader(lines, delimiter=self._separator, strict=True)
        try:
            if self._header:
                next(reader)
            for cells in reader:
                if len(cells) != width:
                    if not cells:
                        continue
                    raise ConversionError(
                        f"{self.shown}, line {reader.line_num}: {len(cells)} cells, but the header has {width} "
                        f"({', '.join(self.names)}): {_cut(self._separator.join(cells))}; put quotation marks around a cell that "
                        f"contains {self._separator!r}, and two of them for one within"
                    )
                yield reader.line_num, [cells[place] or None for place in places]
        except csv.Error as error:
            raise ConversionError(
                f"{self.shown}, line {reader.line_num}: {error}; write quotation marks twice within a cell between them"
            ) from None


class Plain(Table):
    """Lines of cells between separators of one or more characters, without quoting and without a header but ``header``."""

    def __init__(
        self, source: Source, name: str, names: Sequence[str], separator: str, encoding: str = "utf-8", *, header: bool = False
    ) -> None:
        self._source, self._name, self.encoding, self.shown = source, name, encoding, source.shown(name)
        self.names, self._separator, self._header = [*names], separator, header

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        places, width, separator = [self.names.index(name) for name in names], len(self.names), self._separator
        for number, line in itertools.islice(self._source.lines(self._name, self.encoding), int(self._header), None):
            cells = line.rstrip("\r\n").split(separator)
            if len(cells) != width:
                if cells == [""]:
                    continue
                raise ConversionError(
                    f"{self.shown}, line {number}: {len(cells)} cells, but this release has {width} ({', '.join(self.names)}): "
                    f"{_cut(line)}; is the file whole?"
                )
            yield number, [cells[place] or None for place in places]


class JsonLines(Table):
    """One JSON object a line; with ``literal`` also Python literals, as some releases have them. Nothing is evaluated."""

    def __init__(self, source: Source, name: str, encoding: str = "utf-8", *, literal: bool = False) -> None:
        self._source, self._name, self.encoding, self.shown = source, name, encoding, source.shown(name)
        self._literal = literal
        first = [values for _, values in itertools.islice(self._objects(), _SAMPLE)]
        self.names = [*dict.fromkeys(key for values in first for key in values)]
        if not first:
            raise ConversionError(f"{self.shown} has no lines")

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        for number, values in self._objects():
            yield number, [values.get(name) for name in names]

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._source.lines(self._name, self.encoding):
            text = line.strip()
            if not text:
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                values = _literal(text) if self._literal else None
                if values is None:
                    remedy = "one object a line is read, such as jq -c '.[]' writes" if text[0] in "[," else f"{error}"
                    raise ConversionError(f"{self.shown}, line {number}: {_cut(text)} is not a JSON object; {remedy}") from None
            if not isinstance(values, dict):
                raise ConversionError(
                    f"{self.shown}, line {number}: {_cut(text)} is not a JSON object; one object a line is read, such as "
                    "jq -c '.[]' writes"
                )
            yield number, values


class Parquet(Table):
    """A Parquet file, a group of rows at a time."""

    encoding = ""

    def __init__(self, source: Source, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.shown, self._file = source.shown(name), source.path if source.path.is_file() else source.path / name
        if self._file.suffix.lower() == ".zip":
            raise ConversionError(f"{self.shown}: Parquet is not read within an archive; unpack it")
        try:
            self.names = pq.read_schema(self._file).names
        except pa.ArrowException as error:
            raise ConversionError(f"{self._file} is not a Parquet file ({error})") from None

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with pq.ParquetFile(self._file) as file:
                for batch in file.iter_batches(1 << 14, columns=[*names]):
                    columns = [batch.column(name).to_pylist() for name in names]
                    for values in zip(*columns, strict=True):
                        number += 1
                        yield number, values
        except (pa.ArrowException, OSError) as error:
            raise ConversionError(f"{self._file}, row {number + 1}: {error}; is the file whole?") from None


def table(source: Source, name: str, encoding: str = "utf-8") -> Table:
    """The table in a file, by its ending; ``encoding`` is that of a file that is not in UTF-8 and has no byte order mark.

    Raises:
        ConversionError: another ending, or a file that is not what its ending says.
    """
    ending = next((one for one in SUFFIXES if name.lower().removesuffix(".gz").endswith(one)), None)
    if ending == ".parquet":
        return Parquet(source, name)
    if ending is None:
        raise ConversionError(
            f"{source.shown(name)}: files are read that end in {', '.join(SUFFIXES)}, also with .gz or in a .zip; "
            "rename it if it is one of these, or save it as CSV"
        )
    encoding = source.encoding(name, encoding)
    if ending in (".json", ".jsonl", ".ndjson"):
        return JsonLines(source, name, encoding)
    return Delimited(source, name, encoding, separator="\t" if ending == ".tsv" else "")


def _literal(text: str) -> dict[str, Any] | None:
    """A dictionary of Python literals; None for anything else."""
    if len(text) > _LITERAL or not text.startswith("{"):
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell
    return True


def _cut(text: str, width: int = 80) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= width else f"{text[: width - 3]}...")
