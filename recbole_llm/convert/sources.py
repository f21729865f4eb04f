"""The files that are converted: one file, a folder, or a zip archive, plain or gzipped, read as streams; nothing is unpacked."""

from __future__ import annotations

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
_PACKED = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".7z", ".rar", ".bz2", ".xz", ".zst")


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
        self.path, self._archive = path, path if path.suffix == ".zip" else None
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

    def lines(self, name: str, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Number and text of each line, with its line end.

        Raises:
            ConversionError: a line is not text in ``encoding``, or does not end.
        """
        with self.opened(name) as file:
            number = 0
            while line := file.readline(LONGEST):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) == LONGEST:
                    raise ConversionError(f"{self.shown(name)}, line {number}: it has over {LONGEST:,} bytes; is this a table?")
                try:
                    yield number, line.decode(encoding)
                except UnicodeDecodeError as error:
                    cut = line[max(0, error.start - 20) : error.end + 20]
                    raise ConversionError(
                        f"{self.shown(name)}, line {number}: {cut!r} is not text in {encoding}; give --encoding, such as latin-1"
                    ) from None
