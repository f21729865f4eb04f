"""What runs keep under ``checkpoint_dir``, and what killed ones have left there."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from tabulate import tabulate

from recbole_llm.store.files import CHECKPOINT, HOST, TEMPORARY
from recbole_llm.store.json_files import read_object

DAY = 24 * 3600.0
MONTH = 30 * DAY
FRESH = DAY
KINDS = {
    "stages": "trained parts, by what they depend on",
    "scores": "scores of evaluated rows",
    "answers": "generated answers",
    "text_vectors": "vectors of item texts",
    "llm": "dequantised backbones",
    "readings": "how a backbone may be run",
    "candidates": "candidate files",
    "datasets": "united datasets",
    "passports": "identities of splits",
    "runs": "run records",
    "unfinished": "trainings of classical models that were killed",
    "leaderboard": "leaderboards",
    "tuning": "searches",
}


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nobody writes any more.

    Attributes:
        why: for the user.
    """

    path: Path
    why: str

    @property
    def size(self) -> int:
        return _size(self.path)

    def remove(self) -> None:
        """Remove it; another process may have done so."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def temporaries(root: Path) -> list[Leftover]:
    """Temporary files and folders under ``root`` whose process has ended; of another machine's, those that are a day old."""
    found = []
    for path in sorted(root.rglob(".*.tmp")):
        match = TEMPORARY.fullmatch(path.name)
        if match and _has_ended(path, match, DAY):
            found.append(Leftover(path, "written by a process that has ended"))
    return found


def unfinished(root: Path) -> list[Leftover]:
    """Checkpoints of stages and of classical models that nobody computes; the same run would go on from them."""
    locks = {path: path.with_suffix(".lock") for path in root.glob("stages/.*.unfinished")}
    locks |= {path: path.with_name(f".{path.name}.lock") for path in root.glob("unfinished/[!.]*")}
    return [Leftover(path, "checkpoints of a run that was killed") for path in sorted(locks) if not _is_locked(locks[path])]


def weights(root: Path) -> list[Leftover]:
    """Weights of classical models that no record names, and whose process has ended; of another machine's, those a month old.

    While a record cannot be read, there are none: it may name them.
    """
    found = {path for path in root.glob("*.pth") if (match := CHECKPOINT.fullmatch(path.name)) and _has_ended(path, match, MONTH)}
    for record in root.glob("runs/*/record.json") if found else ():
        try:
            read_object(record)
            text = record.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return []
        found = {path for path in found if path.name not in text}  # its own, or that of cf_checkpoint and the like
    return [Leftover(path, "weights of a run that ended without a record") for path in sorted(found)]


def unused(root: Path) -> list[Leftover]:
    """Stages that no run record names, such as those of earlier code; none while a run computes a stage or one is unreadable.

    Those of a day are spared: a run writes its record at its end, and may be between two stages.
    """
    if any(map(_is_locked, root.glob("stages/.*.lock"))):
        return []
    used = set()
    for record in root.glob("runs/*/record.json"):
        try:
            used |= set(read_object(record)["stages"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []  # it may name any; a leaderboard names it as damaged
    stages = (path for path in sorted(root.glob("stages/*")) if path.is_dir() and not path.name.startswith("."))
    return [Leftover(path, "no run record names it") for path in stages if path.name not in used and _age(path) > FRESH]


def contents(root: Path) -> str:
    """A table of what lies under ``root``.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    left, old = _left_over(root), unused(root)
    entries = {name: [path for path in (root / name).glob("*") if not path.name.startswith(".")] for name in KINDS}
    entries["*.pth"] = [*root.glob("*.pth")]
    entries["others"] = [path for path in root.glob("[!.]*") if path.name not in KINDS and path.suffix != ".pth"]
    meanings = KINDS | {"*.pth": "classical models, as RecBole keeps them"}
    meanings["others"] = f"not of this package: {', '.join(_names(entries['others']))}"
    lines = [[name, len(own), _shown(sum(map(_size, own))), meanings[name]] for name, own in entries.items() if own]
    if lines:
        lines.append(["total", "", _shown(_size(root)), "hidden files included"])
    for name, own, about in (
        ("left over", left, "of killed runs: recbole-llm cache clean"),
        ("unused", old, "stages that no record names: recbole-llm cache clean --unused"),
    ):
        if own:
            lines.append([name, len(own), _shown(sum(one.size for one in own)), about])
    return tabulate(lines, headers=["", "entries", "size", ""], disable_numparse=True) if lines else f"{root} is empty"


def clean(root: Path, *, with_unused: bool = False) -> Iterator[str]:
    """Remove what killed runs left and, if asked for, unused stages; yields a line for each.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    for leftover in [*_left_over(root), *(unused(root) if with_unused else [])]:
        line = f"removed {leftover.path} ({_shown(leftover.size)}): {leftover.why}"
        leftover.remove()
        yield line


def _left_over(root: Path) -> list[Leftover]:
    if not root.is_dir():
        raise FileNotFoundError(f"checkpoint_dir: there is no folder {root} (relative to {Path.cwd()})")
    return [*temporaries(root), *unfinished(root), *weights(root)]


def _names(paths: Sequence[Path], most: int = 3) -> list[str]:
    names = sorted(path.name for path in paths)
    return names if len(names) <= most else [*names[:most], "..."]


def _is_locked(lock: Path) -> bool:
    """Whether a process holds the lock of :func:`recbole_llm.store.locks.locked`."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _has_ended(path: Path, writer: re.Match[str], patience: float) -> bool:
    """Whether the process of a file name has ended; on another machine, whether the file is older than ``patience``."""
    return not psutil.pid_exists(int(writer["pid"])) if writer["host"] == HOST else _age(path) > patience


def _age(path: Path) -> float:
    """Seconds since the last change of a file, or of anything in a folder."""
    try:
        return time.time() - max(file.stat().st_mtime for file in (path, *path.rglob("*")))
    except OSError:  # somebody removes it
        return 0.0


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _shown(size: float) -> str:
    """A size in a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
