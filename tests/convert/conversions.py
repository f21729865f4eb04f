"""Tables that the tests of this folder write and convert."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.convert.conversion import Conversion, Options

SONGS = """user,song,artist,genre,played_at
u1,"Hello, Again",Ann &amp; Bo,Rock|Folk,2024-01-31 10:00:00
u2,Rain,Cy,Rock,2024-01-31T11:00:00
u1,Rain,Dee,,2024-02-01 00:00:00
u1,rain ,cy,Rock,2024-02-01 00:00:01
"""


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def convert(path: Path | str, **options: Any) -> dict[str, list[list[str]]]:
    """The files of the new dataset by their ending, as cells."""
    conversion = Conversion(Path(path), Options(to="mine", **options))
    conversion.plan()
    conversion.run()
    files = [file for file in conversion.folder.iterdir() if file.suffix in (".inter", ".item")]
    return {file.suffix: [line.split("\t") for line in file.read_text().splitlines()] for file in files}


def plan(path: Path | str, **options: Any) -> str:
    return "\n".join(Conversion(Path(path), Options(to="mine", **options)).plan())


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        convert(path, **options)
    left = sorted(file.name for file in Path("dataset").glob("*")) if Path("dataset").is_dir() else []
    assert left in ([], ["mine"] if "exists" in str(error.value) else []), "nothing half written"
    return str(error.value)


def write_bytes(name: str, data: bytes) -> Path:
    Path(name).write_bytes(data)
    return Path(name)
