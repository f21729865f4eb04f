"""JSON from disk that may have been written, damaged or edited by anybody: one object, read within bounds."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST = 2**30  # bytes; the record of a run with a million users and five rows has a tenth of them
DEEPEST = 100  # objects within objects; Python's own limit depends on where it is met


CHECKSUM = "checksum"


class DamagedError(ValueError):
    """A file on disk differs from what was written."""


def read_regular(file: Path, largest: int = LARGEST) -> bytes:
    """The bytes of an ordinary file; a pipe would wait for its writer, and a device may have no end.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is no ordinary file, or larger; names it.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # of a folder, the operating system says so
        raise DamagedError(f"{file} is damaged: it is a pipe or a device, not a file")
    if found.st_size > largest:
        raise DamagedError(f"{file} is damaged: it has {found.st_size:,} bytes, and none of its kind has more than {largest:,}")
    return file.read_bytes()


def read_object(file: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        OSError: the file cannot be read.
        DamagedError: it is too large, not JSON in UTF-8, no object, too deep, or has a key twice; names the file and the fault.
    """
    try:
        found = json.loads(read_regular(file, largest).decode("utf-8"), object_pairs_hook=_unique)
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{file} is damaged: it holds a {type(found).__name__}, not an object")
    if is_deep(found):
        raise DamagedError(f"{file} is damaged: it has more than {DEEPEST} objects within objects")
    return found


def sealed(content: Mapping[str, Any]) -> str:
    """The text of a JSON file, with the SHA-256 of its values, whatever their order and layout."""
    values = json.loads(json.dumps(content, default=float))
    return json.dumps({**values, CHECKSUM: checksum(values)}, indent=1)


def checksum(values: Mapping[str, Any]) -> str:
    """The SHA-256 of values without their own checksum."""
    own = {key: value for key, value in values.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_sealed(file: Path) -> dict[str, Any]:
    """The values of a small file of :func:`sealed`.

    Raises:
        OSError: the file cannot be read.
        DamagedError: as :func:`read_object`, or the values are not those that were written.
    """
    found = read_object(file, 2**24)
    if found.pop(CHECKSUM, None) != checksum(found):
        raise DamagedError(f"{file} is damaged: its values are not those that were written")
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def is_deep(found: Any) -> bool:
    """Whether a value of JSON has more than :data:`DEEPEST` objects and lists within each other."""
    level = [found] if isinstance(found, (dict, list)) else []
    for _ in range(DEEPEST):
        parts = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level = [part for part in parts if isinstance(part, (dict, list))]
        if not level:
            return False
    return True
