"""Imported checkpoints: RecBole's ``.pth`` files, read without importing or calling anything that they name.

RecBole pickles its whole ``Config`` with the weights. ``torch.load(weights_only=False)`` would execute the file.
``weights_only=True`` always refuses it, since RecBole uses pickle protocol 4 and torch's unpickler supports protocol 2 only.
Before 2.10, torch also does not compare the size of a storage with the bytes in the file. Here, the standard library's
unpickler replaces all classes and functions by placeholders, from which the tensors of the state dict are made. Number and
CRC-32 of the bytes are checked, and torch checks that each tensor is a valid view of them.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.classical import portable_weights
from recbole_llm.store.json_files import read_object

_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
}
_PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A model's tensors, on the CPU, and the plain values of its configuration ({} if there is none).

    Attributes:
        others: the tensors that it keeps beside its weights, such as Pop's counts.
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    others: dict[str, Tensor] = field(default_factory=dict)

    def settings(self, model: str) -> dict[str, Any]:
        """The hyper-parameters of a model of RecBole; RecBole's own checkpoint, without ``train_mode``, counts as ``prefix``."""
        import recbole

        file = files(recbole) / "properties" / "model" / f"{model}.yaml"
        known = {"MAX_ITEM_LIST_LENGTH", "train_mode", *(yaml.safe_load(file.read_text()) or {})} if file.is_file() else set()
        return {"train_mode": "prefix"} | {key: value for key, value in self.config.items() if key in known}


class _RefusedError(ValueError):
    """The problem with a file and the remedy; the caller adds the file."""


def _portable(path: Path) -> ImportedCheckpoint:
    """A state dict, or shared weights (``recbole-llm share``) with the settings that stand beside them."""
    tensors, settings = load_file(path), path.with_name("settings.json")
    own = portable_weights.state_of(tensors)
    if own is None:
        return ImportedCheckpoint(tensors, {})
    config = read_object(settings) if settings.is_file() else {}
    return ImportedCheckpoint(own, config, portable_weights.others_of(tensors))


def read_checkpoint(file: str | Path, key: str = "cf_checkpoint") -> ImportedCheckpoint:
    """Read a checkpoint of RecBole or this package, or a ``.safetensors`` state dict; nothing in it is executed.

    Args:
        file: path; ``~`` is the home folder.
        key: the setting that gave ``file``, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or has no state dict of ordinary tensors; names key, file and remedy.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{key}: {path} is not a file (relative to {Path.cwd()}); give a checkpoint, like saved/*.pth")
    try:
        if path.suffix == ".safetensors":
            return _portable(path)
        with open(path, "rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise _RefusedError("it is not in torch.save's zip format; save it again with torch 1.6 or newer")
            with zipfile.ZipFile(stream) as zipped:
                return _read(_Archive(zipped, path.stat().st_size))
    except _RefusedError as error:
        raise ValueError(f"{key}: {path} is refused: {error}") from error
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{key}: {path} is damaged ({type(error).__name__}: {error}); copy it again or train again") from error


def _read(archive: _Archive) -> ImportedCheckpoint:
    pickled = archive.read("data.pkl")
    _check(pickled)
    content = _Unpickler(io.BytesIO(pickled)).load()
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise _RefusedError("it has no state_dict; write one with torch.save({'state_dict': model.state_dict()}, file)")
    state = {name: archive.tensor(name, record) for name, record in content["state_dict"].items()}
    beside = content.get("other_parameter")
    others = {
        name: archive.tensor(name, record)
        for name, record in (beside.items() if isinstance(beside, dict) else ())
        if isinstance(record, _Inert) and record.origin == _TENSOR and not str(name).startswith(portable_weights.COMPUTED)
    }
    config = content.get("config")
    if isinstance(config, _Inert):  # RecBole's Config
        config = config.state.get("final_config_dict") if isinstance(config.state, dict) else None
    return ImportedCheckpoint(state, _plain(config, itertools.count()) if isinstance(config, dict) else {}, others)


def _plain(value: Any, visited: Iterator[int]) -> Any:
    """The plain data in ``value``."""
    if next(visited) > 100_000:  # lists that contain each other expand exponentially
        raise _RefusedError("its config is no configuration but over 100000 values; leave it out of the file")
    if isinstance(value, dict):
        return {k: _plain(v, visited) for k, v in value.items() if isinstance(k, str) and isinstance(v, _PLAIN)}
    return [_plain(v, visited) for v in value if isinstance(v, _PLAIN)] if isinstance(value, (list, tuple)) else value


# -- the pickle --------------------------------------------------------------------------------------------------------


class _Inert:
    """Placeholder for a class or function: supports all operations of a pickle, stores arguments and state, does nothing."""

    origin = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        made = object.__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    __call__ = __setitem__ = append = add = _ignore


class _Ordered(dict[Any, Any]):
    """Placeholder for OrderedDict; drops its attributes, in which torch stores the versions of modules."""

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """An unpickler in which every global is a placeholder, so a pickle can call and change nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        origin = f"{module_name}.{global_name}"
        return type("Placeholder", (_Ordered if origin == "collections.OrderedDict" else _Inert,), {"origin": origin})

    def persistent_load(self, pid: Any) -> _Inert:
        return _Inert(*pid)


def _check(pickled: bytes) -> None:
    """Refuse pickles that exhaust an unpickler: by huge memo indices, or by keys nested so deep that their hash crashes."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(pickled):  # fails on lengths beyond the end
        tuples += opcode.name.startswith("TUPLE")
        if tuples > 50_000 or (opcode.name.endswith("PUT") and int(argument or 0) > len(pickled)):
            raise _RefusedError("its pickle would exhaust the memory or the stack; get the file from its author")


# -- tensors -----------------------------------------------------------------------------------------------------------


class _Archive:
    """The records of torch's zip format, and their tensors."""

    def __init__(self, zipped: zipfile.ZipFile, size: int):
        self.zipped = zipped
        self.records = {info.filename.partition("/")[2]: info for info in zipped.infolist()}  # one folder holds all
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self.elements_left = size  # a limit, since tensors with stride 0 could have any size
        if "byteorder" in self.records and self.read("byteorder").decode() != sys.byteorder:
            raise _RefusedError(f"its byte order is not this machine's, {sys.byteorder}; save it as .safetensors")

    def read(self, name: str) -> bytes:
        """The bytes of a record, after checking their CRC-32."""
        if name not in self.records:
            raise _RefusedError(f"it has no record {name}, which torch.save writes; copy or save it again")
        if self.records[name].compress_type != zipfile.ZIP_STORED:
            raise _RefusedError(f"its record {name} is compressed, which torch.save does not do; save it again")
        return self.zipped.read(self.records[name])

    def storage(self, reference: _Inert) -> Tensor:
        """The values [elements] of a storage, read once."""
        _, kind, key, _, elements = reference.args
        dtype = _DTYPES.get(kind.origin)
        if dtype is None:
            raise _RefusedError(f"it has a {kind.origin}, which is unknown; save it as .safetensors")
        if (key, dtype) not in self.storages:
            data = self.read(f"data/{key}")
            if len(data) != elements * dtype.itemsize:
                raise ValueError(f"data/{key} has {len(data)} bytes and not {elements} elements of {dtype}")
            self.storages[key, dtype] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key, dtype]

    def tensor(self, name: Any, record: Any) -> Tensor:
        """The tensor of the state dict's entry ``name``, a view of its storage."""
        if isinstance(record, _Inert) and record.origin == _PARAMETER:
            record = record.args[0]
        if not isinstance(name, str) or not isinstance(record, _Inert) or record.origin != _TENSOR or any(record.args[6:]):
            found = getattr(record, "origin", "") or type(record).__name__
            raise _RefusedError(f"state_dict[{name!r}] is no ordinary tensor but {found}; remove it, or save it dense")
        reference, offset, size, stride = record.args[:4]
        self.elements_left -= math.prod(size)
        if self.elements_left < 0:
            raise _RefusedError(f"state_dict[{name!r}] has more elements than the file has bytes; save it after .contiguous()")
        return self.storage(reference).as_strided(size, stride, offset)  # torch checks the bounds
