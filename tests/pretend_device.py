"""A simulated accelerator: an operation on tensors of different devices is an error, while all values are computed on the CPU.

:func:`pretend_device` makes ``torch.device("cuda:0")`` and other indices usable on a machine without one. Each storage has a
label, the device that it would be on. A function mode answers what Python asks (``.device``, ``.to``, factories with
``device=``); a dispatch mode sees every operation, those of backward passes included, and raises PyTorch's error if its tensors
are on different devices. The exceptions are PyTorch's own:

- a CPU scalar (no dimension) in a pointwise operation that writes to no CPU tensor;
- CPU indices of a tensor on a device, and a CPU scalar as the value put there;
- ``copy_``.

Tensors that C++ makes without an input, such as zeros in a backward pass, have the device of the tensors they are used with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

CPU, PRETEND = torch.device("cpu"), torch.device("cuda:0")
ANY = None  # the label of a tensor that C++ made without an input
EXPIRED_AT = 20_000  # labels, before those of freed storages are dropped

_aten = torch.ops.aten
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_COPIES = {"aten::copy_", "aten::_copy_from"}
_WITH_SCALARS = {"aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::fill_", "aten::_foreach_mul_"}
_HOST_LENGTHS = {"aten::_pack_padded_sequence"}
_DEVICE_OF = {torch.Tensor.device.__get__: "device", torch.Tensor.is_cuda.__get__: "cuda", torch.Tensor.is_cpu.__get__: "cpu"}
_TO_HOST = (torch.Tensor.numpy, torch.Tensor.__array__)


class Labels:
    """The device of each storage; a storage without an entry is on the CPU."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}

    def of(self, tensor: Tensor) -> torch.device | None:
        storage = _storage(tensor)
        return tensor.device if storage is None else self._by_storage.get(storage._cdata, (None, CPU))[1]

    def known(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is None or self._by_storage.get(storage._cdata, (None, ANY))[1] is not ANY

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        if len(self._by_storage) > EXPIRED_AT:
            self._by_storage = {key: entry for key, entry in self._by_storage.items() if not entry[0].expired()}
        self._by_storage[storage._cdata] = (StorageWeakRef(storage), device)  # the reference keeps the key from being reused


def _storage(tensor: Tensor) -> Any:
    """The storage that carries the label; None for a tensor without one, such as those of the device ``meta``."""
    with torch._C.DisableTorchFunction():
        if tensor.layout != torch.strided:
            with _disable_current_modes():
                tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # of functorch
            return None
        return None if storage.device.type == "meta" else storage


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """The instances of ``kind`` in lists, tuples and dictionaries; faster than ``torch.utils._pytree``."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part, kind)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part, kind)


def _tensors(value: Any) -> list[Tensor]:
    return list(_leaves(value, Tensor))


def _device(given: Any) -> torch.device:
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    return torch.device("cuda:0") if device == torch.device("cuda") else device


class _Dispatch(TorchDispatchMode):
    """Checks each operation and labels its results."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = self._checked(func, args, kwargs)
        result = func(*args, **kwargs)
        before = {storage._cdata for tensor in _tensors((args, kwargs)) if (storage := _storage(tensor)) is not None}
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage is not None and storage._cdata not in before:
                self.labels.put(tensor, device)
        return result

    def _checked(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        """The device of an operation. Raises RuntimeError if its tensors are on different ones."""
        tensors = _tensors((args, kwargs))
        found = {label for tensor in tensors if (label := self.labels.of(tensor)) not in (ANY, torch.device("meta"))}
        if found - {CPU} and any(_leaves((args, kwargs), torch.Generator)):
            raise RuntimeError(f"{func}: expected a generator of {found}, but found one of cpu")
        if len(found) < 2:
            return next(iter(found), ANY)
        name, accelerators = func._schema.name, found - {CPU}
        refused = RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {sorted(map(str, found))}: "
            + ", ".join(f"{list(tensor.shape)} on {self.labels.of(tensor)}" for tensor in tensors)
        )
        if name in _COPIES:
            return self.labels.of(args[0])
        if len(accelerators) > 1:
            raise refused
        others = [tensor for tensor in tensors if self.labels.of(tensor) == CPU]
        if name in _INDEXED:
            indices = _tensors(args[1])
            others = [tensor for tensor in others if not any(tensor is index for index in indices)]
        if name in _HOST_LENGTHS:
            others = [tensor for tensor in others if tensor is not args[1]]
        scalars = torch.Tag.pointwise in func.tags or name in _INDEXED or name in _WITH_SCALARS
        written = [tensor for tensor in _written(func, args, kwargs) if self.labels.of(tensor) == CPU]
        if written or not all(tensor.dim() == 0 and scalars for tensor in others):
            raise refused
        return accelerators.pop()


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return _tensors([given[name] for name in names if name in given])


class _Function(TorchFunctionMode):
    """Answers what Python asks a tensor or a factory about its device."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DEVICE_OF:
            device = self.labels.of(args[0]) or CPU
            return device if _DEVICE_OF[func] == "device" else device.type == _DEVICE_OF[func]
        if getattr(func, "__name__", "") == "__get__":
            return func(*args)
        if func is torch.Tensor.get_device:
            device = self.labels.of(args[0]) or CPU
            return -1 if device == CPU else device.index
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(args[0], CPU if func is torch.Tensor.cpu else PRETEND)
        if func in _TO_HOST and self.labels.of(args[0]) not in (CPU, ANY):
            raise TypeError(f"can't convert {self.labels.of(args[0])} device type tensor to numpy. Use Tensor.cpu() first")
        device = _device(kwargs["device"]) if kwargs.get("device") is not None else None
        if device is not None and device.type != "meta":
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None and kwargs["generator"].device.type != device.type:
                raise RuntimeError(f"{func}: expected a generator of {device}, but found one of cpu")
            found = func(*args, **kwargs)
            return tree_map_only(Tensor, lambda tensor: self._placed(tensor, device, args), found)
        args, kwargs = self._with_moved_scalars(func, args, kwargs)
        result = func(*args, **kwargs)
        self._label(result, _tensors((args, kwargs)))
        return result

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if (other := kwargs.pop("other", None)) is not None or (args and isinstance(other := args[0], Tensor)):
            device, dtype, memory_format = self.labels.of(other) or CPU, other.dtype, None
        else:
            if args and isinstance(args[0], int) and not isinstance(args[0], bool):
                args = (_device(args[0]), *args[1:])
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = self.labels.of(tensor) or CPU
        device = here if device is None else _device(device)
        format_ = {} if memory_format is None else {"memory_format": memory_format}
        if "meta" in (device.type, here.type):
            return tensor.to(device=device if device.type == "meta" else CPU, dtype=dtype, **format_)
        if device != here:
            tensor = _Move.apply(tensor, self.labels, here, device)
        cast = tensor.to(dtype=dtype or tensor.dtype, copy=copy, **format_)
        if cast is not tensor:
            self.labels.put(cast, device)
        return cast

    def _placed(self, tensor: Tensor, device: torch.device, args: Any) -> Tensor:
        """A new tensor on ``device``; a copy if it shares its storage with an argument on another one."""
        here = self.labels.of(tensor)
        shared = any(_storage(tensor)._cdata == _storage(other)._cdata for other in _tensors(args) if _storage(other) is not None)
        if shared and here != device:
            return _Move.apply(tensor, self.labels, here, device)
        if not shared:
            self.labels.put(tensor, device)
        return tensor

    def _label(self, result: Any, given: list[Tensor]) -> None:
        """Label tensors that no operation has labelled: those of factories, and copies that are made without an operation."""
        fresh = [tensor for tensor in _tensors(result) if not self.labels.known(tensor)]
        if fresh:
            own = {storage._cdata for tensor in given if (storage := _storage(tensor)) is not None}
            devices = [label for tensor in given if (label := self.labels.of(tensor)) not in (ANY, torch.device("meta"))]
            device = next((label for label in devices if label != CPU), CPU)
            for tensor in fresh:
                if _storage(tensor)._cdata not in own:
                    self.labels.put(tensor, device)

    def _with_moved_scalars(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """CPU scalars with gradients, moved to the device of the others, as autograd moves their gradients back."""
        tensors = _tensors((args, kwargs))
        scalars = [t for t in tensors if t.dim() == 0 and t.requires_grad and self.labels.of(t) == CPU]
        others = {label for t in tensors if (label := self.labels.of(t)) not in (ANY, CPU, torch.device("meta"))}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i") or "out" in kwargs
        if not scalars or len(others) != 1 or not torch.is_grad_enabled() or in_place:
            return args, kwargs
        device = others.pop()

        def moved(tensor: Tensor) -> Tensor:
            return _Move.apply(tensor, self.labels, CPU, device) if any(tensor is scalar for scalar in scalars) else tensor

        return tree_map_only(Tensor, moved, (args, kwargs))


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, labels: Labels, here: torch.device, there: torch.device) -> Tensor:
        ctx.route = labels, here
        with torch._C.DisableTorchFunction():
            copied = tensor.clone()
        labels.put(copied, there)
        return copied

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        labels, here = ctx.route
        with torch._C.DisableTorchFunction():
            copied = gradient.clone()
        labels.put(copied, here)
        return copied, None, None, None


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Within this context, tensors can be on the device that it yields and on others with another index."""
    labels, load = Labels(), torch.load

    def load_on_device(*args: Any, map_location: Any = CPU, **kwargs: Any) -> Any:
        found = load(*args, map_location=CPU, **kwargs)
        for tensor in _tensors(found):
            labels.put(tensor, _device(map_location))
        return found

    torch.load = load_on_device
    try:
        with _Dispatch(labels), _Function(labels):
            yield PRETEND
    finally:
        torch.load = load
