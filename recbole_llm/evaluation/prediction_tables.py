"""Tables of Parquet, CSV and JSON lines files, whose errors name the file, the row and the remedy."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from recbole_llm.store.json_files import DEEPEST, is_deep

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
_PACKED = (".gz", ".bz2", ".zst")


def read_table(path: Path) -> pa.Table:
    """The table of a file, whose ending tells its form; cells of a CSV are texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown ending, or the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"predictions: there is no file {path} (current folder: {Path.cwd()})")
    ending = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() not in _PACKED), "")
    reader = {"parquet": _parquet, "pq": _parquet, "jsonl": _json_lines, "ndjson": _json_lines, "json": _json_lines}
    reader |= {"csv": _csv, "tsv": _csv, "txt": _csv, "inter": _csv}
    if ending.removeprefix(".") not in reader:
        raise ValueError(
            f"predictions: {path} ends in {ending or 'nothing'}, an unknown form; give a .parquet, .csv, .tsv or .jsonl file"
        )
    if not path.stat().st_size:
        raise ValueError(f"predictions: {path} is empty; write it again")
    try:
        table = reader[ending.removeprefix(".")](path)
        table.validate(full=True)  # texts that are not UTF-8
        names = table.column_names
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, csv.Error, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"predictions: {path} cannot be read as {ending.removeprefix('.')}: {reason}; write it again") from error
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"predictions: {path} has several columns {min(repeated)!r}; rename one of them")
    return table


def _parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _csv(path: Path) -> pa.Table:
    with pa.input_stream(str(path), compression="detect") as stream:
        header = stream.read(65536).decode("utf-8-sig", errors="replace")
    header = (header.splitlines() or [""])[0]
    separator = max(SEPARATORS, key=header.count)
    if separator not in header:
        raise ValueError(
            f"predictions: {path}: the header {header[:80]!r} has none of the separators {', '.join(SEPARATORS.values())}; "
            "write the file with one of them, and with a line of column names"
        )
    names = next(csv.reader([header], delimiter=separator))
    with pa.input_stream(str(path), compression="detect") as stream:
        return pacsv.read_csv(
            stream,
            read_options=pacsv.ReadOptions(use_threads=False, column_names=names, skip_rows=1),  # one thread: errors name the row
            parse_options=pacsv.ParseOptions(delimiter=separator),
            convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )


def _json_lines(path: Path) -> pa.Table:
    """Raises ValueError for the first line that is no JSON object, or is one within objects without end."""
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), start=1):
            if not _is_flat(line):  # deeper ones overflow the stack of pyarrow's reader, which ends the process
                _check_line(path, number, line.decode("utf-8-sig", errors="replace"))
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            return pajson.read_json(stream)
    except pa.ArrowInvalid:
        with pa.input_stream(str(path), compression="detect") as stream:
            _find_damage(path, stream.read())
        raise


def _is_flat(line: bytes) -> bool:
    """Whether a line is surely one object without others within it."""
    line = line.strip()
    once = line[:1] == b"{" and line[-1:] == b"}" and line.count(b"{") == 1 == line.count(b"}")
    return not line or (once and b"[" not in line and b"\\" not in line and not line.count(b'"') % 2)


def _find_damage(path: Path, content: bytes) -> None:
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        _check_line(path, number, line)


def _check_line(path: Path, number: int, line: str) -> None:
    if not line.strip():
        return
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        found, reason = None, str(error)
    else:
        reason = (
            f"more than {DEEPEST} objects within objects" if is_deep(found) else f"{type(found).__name__} instead of an object"
        )
    if not isinstance(found, dict) or is_deep(found):
        raise ValueError(
            f"predictions: {path}, line {number}: {reason}; each line is an object such as "
            '{"user": "196", "item": "242", "score": 0.25}'
        )
