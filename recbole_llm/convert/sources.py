"""The files that are converted: one file, a folder, or a zip archive, plain or gzipped, read as streams; nothing is unpacked."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

LONGEST = 1 << 26
"""Bytes of a line at most: a longer one is not a line of a table."""
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".jsonl", ".ndjson", ".json", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
SPREADSHEET = "a spreadsheet; save it as CSV (UTF-8) with the program that made it, and give that file"
_PACKED = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".7z", ".rar", ".bz2", ".xz", ".zst")
_MARKS = (  # UTF-32's begins as UTF-16's does
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")),
    *((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")),
)
_BINARY = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx and .ods, and .xls, begin
_BLOCK = 1 << 20  # bytes


class ConversionError(ValueError):
    """Something cannot be converted; the message names file, line, column, value and remedy, if there are any."""


class Source:
    """The files of a folder, of a zip archive, or of the folder in which a given file stands.

    Attributes:
        path: as the user gave it.
        file: name of the file that the user gave; None for a folder or an archive.
        names: the files, by name alone; of several files of one name in an archive, the one with the shortest path.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: a form that is not read.
    """

    def __init__(self, path: Path, key: str = "SOURCE") -> None:
        if not path.exists():
            raise FileNotFoundError(f"{key}: {path} does not exist (current folder: {Path.cwd()})")
        if path.name.endswith(_PACKED):
            raise ConversionError(f"{key}: {path} is an archive of a kind that is not read; unpack it and give its folder")
        if path.name.lower().endswith(SPREADSHEETS):
            raise ConversionError(f"{key}: {path} is {SPREADSHEET}")
        self.path, self._archive = path, path if path.suffix.lower() == ".zip" else None
        self.file = path.name if path.is_file() and not self._archive else None
        self._members: dict[str, str] = {}
        if self._archive:
            try:
                with zipfile.ZipFile(path) as archive:
                    members = sorted(archive.namelist(), key=len, reverse=True)
            except zipfile.BadZipFile as error:
                raise ConversionError(f"{key}: {path} is not a zip archive ({error}); download it again") from None
            self._members = {name.rpartition("/")[2]: name for name in members if not name.startswith("__MACOSX/")}
        folder = path if path.is_dir() else path.parent
        found = [*self._members] if self._archive else [file.name for file in folder.iterdir() if file.is_file()]
        self.names = sorted(name for name in found if name and not name.startswith("."))
        self._folder = folder

    def shown(self, name: str) -> str:
        """The file as messages name it."""
        return f"{self._archive}, {name}" if self._archive else str(self._folder / name)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """A file's bytes, unzipped.

        Raises:
            ConversionError: it is damaged. Raised by whatever reads that part of it.
        """
        try:
            with contextlib.ExitStack() as stack:
                if self._archive:
                    archive = stack.enter_context(zipfile.ZipFile(self._archive))
                    raw = cast(BinaryIO, stack.enter_context(archive.open(self._members[name])))
                else:
                    raw = stack.enter_context(open(self._folder / name, "rb"))
                yield cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=raw))) if name.endswith(".gz") else raw
        except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
            raise ConversionError(f"{self.shown(name)} is damaged or was cut off ({error}); download it again") from None

    def encoding(self, name: str, given: str) -> str:
        """The encoding of a text: that of its byte order mark; UTF-8, if all of it is and not only ASCII; else ``given``."""
        with self.opened(name) as file:
            block = file.read(_BLOCK)
            codec, _ = _codec(block, given)
            if len("\n".encode(codec)) > 1 or codec == "utf-8":
                return codec
            decoder, ascii_alone = codecs.getincrementaldecoder("utf-8")(), True
            try:
                while block:
                    decoder.decode(block)
                    ascii_alone &= block.isascii()
                    block = file.read(_BLOCK)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return given
            return given if ascii_alone else "utf-8"

    def lines(self, name: str, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Number and text of each line, with its line end. A byte order mark counts more than ``encoding``.

        Raises:
            ConversionError: a line is not text in ``encoding``, or does not end.
        """
        with self.opened(name) as file:
            head, number = file.read(4), 0
            encoding, start = _codec(head, encoding)
            file.seek(start)
            end = "\n".encode(encoding)
            if head.startswith(_BINARY):
                raise ConversionError(f"{self.shown(name)} is no text, whatever its ending says; is it {SPREADSHEET}")
            if len(end) == 1 and b"\0" in head:
                raise ConversionError(f"{self.shown(name)} has zero bytes, as UTF-16 has; give --encoding=utf-16, if it is text")
            while line := _line(file, end):
                number += 1
                if len(line) >= LONGEST:
                    raise ConversionError(f"{self.shown(name)}, line {number}: it has over {LONGEST:,} bytes; is this a table?")
                try:
                    yield number, line.decode(encoding)
                except UnicodeDecodeError as error:
                    cut = line[max(0, error.start - 20) : error.end + 20]
                    raise ConversionError(
                        f"{self.shown(name)}, line {number}: {cut!r} is not text in {encoding}; give --encoding, such as latin-1"
                    ) from None


def _codec(head: bytes, given: str) -> tuple[str, int]:
    """The encoding of a text that begins with ``head``, with its order of bytes, and the length of its byte order mark."""
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return codec, len(mark)
    name = codecs.lookup(given).name
    if name in ("utf-16", "utf-32"):
        return f"{name}-be" if head[:1] == b"\0" else f"{name}-le", 0
    return "utf-8" if name in ("utf-8", "utf-8-sig") else given, 0


def _line(file: BinaryIO, end: bytes) -> bytes:
    """The bytes of a line up to its line feed ``end``, which is as wide as a character; about ``LONGEST`` at most."""
    line = file.readline(LONGEST)
    if len(end) == 1:
        return line
    while line and len(line) < LONGEST:
        line += file.read(-len(line) % len(end))  # the rest of a character that has the byte of a line feed
        if line.endswith(end) or not (more := file.readline(LONGEST)):
            break
        line += more
    return line
