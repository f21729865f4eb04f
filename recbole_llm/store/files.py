"""Atomic files and folders: safetensors and JSON with SHA-256 checksums, no pickle.

A file or folder is written under a temporary name, flushed to disk and renamed, so that a killed process leaves the old or the
new one. A folder has a manifest of SHA-256 sums, written last; :func:`verify` rejects files that do not match it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recbole_llm.store.json_files import DamagedError, read_object

MANIFEST = "MANIFEST.json"
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors, tokenizers
_TORCH = re.compile(r"PytorchStreamWriter|inline_container.*(unexpected pos|write)", re.DOTALL)
_WRITER = r"(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}"
TEMPORARY = re.compile(rf"\..+\.{_WRITER}\.(old\.)?tmp")
"""Names of temporary files and folders, with the machine and the process that writes them."""
CHECKPOINT = re.compile(rf".+-{_WRITER}\.pth")
"""Names of the weights of classical models, likewise."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writer() -> str:
    """A part of a file name, unlike any other, that says which process writes it."""
    return f"{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def temporary_name(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name beside ``path`` that says who writes it, as :data:`TEMPORARY`."""
    return path.with_name(f".{path.name}.{writer()}.{suffix}")


def _sweep(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left beside it; of another machine's, nobody knows."""
    import psutil

    for left in path.parent.glob(f".{glob.escape(path.name)}.*tmp"):
        writer = TEMPORARY.fullmatch(left.name)
        if writer and writer["host"] == HOST and not psutil.pid_exists(int(writer["pid"])):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Give an error of the disk the name of what is written: Python's have none for a write that fails, and those of
    safetensors, tokenizers and torch are not even OSErrors.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        number = _RUST.search(str(error))
        if number or _TORCH.search(str(error)):
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file name; what is written to it becomes ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the complete new one."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path``, with its manifest, when the block ends without an error.

    An existing ``path`` is replaced (moved first: a folder cannot be renamed over another).
    """
    path = Path(path)
    _sweep(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            _write_manifest(temporary)
            _place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path.parent)


def _place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``, in place of one that is there or that another process puts there at the same time."""
    moved: list[Path] = []
    while True:
        if path.exists():
            with contextlib.suppress(FileNotFoundError):  # the other process was faster
                os.replace(path, old := temporary_name(path, "old.tmp"))
                moved.append(old)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
        else:
            break
    for old in moved:
        shutil.rmtree(old)


def _write_manifest(folder: Path) -> None:
    sums = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST):
        _flush(file)
        sums[file.relative_to(folder).as_posix()] = sha256_file(file)
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1))
    _flush(folder / MANIFEST)
    _flush(folder)


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` was written completely; :func:`verify` checks for later damage."""
    return (folder / MANIFEST).is_file()


def verify(folder: Path, besides: Collection[str] = ()) -> None:
    """Check every file of ``folder`` against its manifest; hidden files, such as those of file managers, are not read by anybody.

    Args:
        besides: names of files that people may edit, which are not read either.

    Raises:
        DamagedError: the manifest names no file, or a file is missing, differs or is not named; the message names it.
    """
    try:
        expected = {name: str(digest) for name, digest in read_object(folder / MANIFEST, 2**26).items()}
    except (OSError, DamagedError) as error:
        raise DamagedError(f"{folder}: its {MANIFEST} is missing or unreadable ({error}); delete the folder") from error
    if not expected:
        raise DamagedError(f"{folder}: its {MANIFEST} names no file, so it vouches for none; delete the folder to rebuild it")
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        # a folder within it that was written as one, such as a merged adapter, has a manifest of its own
        if not (file.is_dir() or file.name.startswith(".") or file.name == MANIFEST or name in expected or name in besides):
            raise DamagedError(f"{file}: it is not in {MANIFEST}, so it was put there later; remove it, or delete the folder")
    for name, digest in expected.items():
        file = folder / name
        if name in besides:
            continue
        if not is_within(folder, name):
            raise DamagedError(f"{folder}: its {MANIFEST} names {name!r}, which is elsewhere; delete the folder to rebuild it")
        if not file.is_file():
            raise DamagedError(f"{folder}: the file {name} is missing; delete the folder to rebuild it")
        if sha256_file(file) != digest:
            raise DamagedError(f"{file}: its SHA-256 is not the one in {MANIFEST}; delete the folder to rebuild it")


def is_within(folder: Path, name: Any) -> bool:
    """Whether ``name``, from a file, names something within ``folder``: no absolute path, and none through ``..``."""
    return isinstance(name, str) and os.path.normpath(folder / name).startswith(os.path.normpath(folder) + os.sep)


def check_sum(file: Path) -> None:
    """Check a file that is read without its folder, if there is a manifest beside it.

    Raises:
        DamagedError: it is not what was written, or the manifest does not name it.
    """
    if not is_complete(file.parent):
        return
    digest = read_object(file.parent / MANIFEST, 2**26).get(file.name)
    if digest is None:
        raise DamagedError(f"{file} is not in the {MANIFEST} beside it, which does not vouch for it")
    if digest != sha256_file(file):
        raise DamagedError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors to a safetensors file, not atomically: for use within :func:`atomic_folder`."""
    # clone: safetensors rejects shared storage
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, file)


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Write named tensors and JSON-serialisable values as one atomic folder."""
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / "tensors.safetensors", tensors)
        (temporary / "values.json").write_text(json.dumps(values))


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Verify and read a folder of :func:`save_state`.

    Raises:
        DamagedError: the folder does not match its manifest.
    """
    verify(folder)
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "values.json").read_text())
