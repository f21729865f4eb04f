"""A frozen LM over several processes (``fsdp: True``): each holds a part of every layer, and a whole layer while it computes it.

As in fully sharded data parallelism, the weights of a layer are gathered before its forward and its backward pass, and dropped
afterwards. Since they are frozen, there are no gradients to scatter. What is trained around them stays whole in each process.

Processes need not run equal numbers of passes. Whoever needs a layer asks for it, and then all processes, which ask for a layer
or wait for each other, say which one they want: the first one of these is gathered, until none is wanted. ``fully_shard`` of
torch expects all to gather the same, and gathers before a backward pass when a layer's output gets its gradient. If keys and
values in a cache are all that gets one, as in a merge with gradients, it computes with freed weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from logging import getLogger
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from recbole_llm.store.processes import Processes, before_meeting, current

logger = getLogger()

ALIGNED = 512  # bytes: weights begin at multiples, as those that PyTorch allocates on a GPU, so that products round alike
LINE = 64  # bytes of a CPU's line of memory; a file of weights may begin anywhere in it, and products round accordingly
NOTHING = 2**62  # what a process wants that needs no layer
_numbers = count()
_layers: WeakValueDictionary[int, ShardedLayer] = WeakValueDictionary()  # in the order of loading, equal in all processes


class _Place(NamedTuple):
    """Of a weight among the bytes of its layer. The parameter itself has no memory; a module has the values in its place."""

    module: nn.Module
    name: str
    weight: nn.Parameter
    start: int
    end: int


class _Saved(NamedTuple):
    """A view of whole weights that the graph needs for its backward pass."""

    dtype: torch.dtype
    offset: Any
    size: torch.Size
    stride: tuple[int, ...]


class ShardedLayer:
    """The frozen weights of a layer.

    Attributes:
        part: this process's bytes of them.
        changes: what is done to the weights whenever they are gathered, by a name of the weight: adapters that are folded in.
    """

    _held: ShardedLayer | None = None  # the one layer that is whole while none computes

    def __init__(self, layer: nn.Module, weights: set[nn.Parameter], processes: Processes, device: torch.device):
        self._processes, self._number = processes, next(_numbers)
        self._whole: Tensor | None = None
        self._open = 0
        self._pass: list[Any] = []  # the contexts of the pass under way
        self.changes: dict[str, Callable[[], None]] = {}
        ends: dict[nn.Parameter, int] = {}
        self._places: list[_Place] = []
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight in weights:
                    size = weight.numel() * weight.element_size()
                    shift = weight.data_ptr() % LINE if device.type == "cpu" else 0
                    end = ends.setdefault(weight, _aligned(max(ends.values(), default=0)) + shift + size)
                    self._places.append(_Place(module, name, weight, end - size, end))
        size = _aligned(-(-max(ends.values(), default=0) // processes.size))  # bytes of a part
        whole = torch.zeros(size * processes.size, dtype=torch.uint8)
        for weight, end in ends.items():
            values = weight.detach().contiguous().view(-1).view(torch.uint8)
            whole[end - len(values) : end] = values
            missing = torch.full((1,), float("nan") if weight.is_floating_point() else 0, dtype=weight.dtype, device=device)
            weight.data = missing.expand(weight.shape)
            weight.sharded = self  # type: ignore[attr-defined]
        self.part = whole[processes.rank * size : (processes.rank + 1) * size].clone().to(device)
        _layers[self._number] = self
        layer.sharded = self  # type: ignore[assignment]
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def change(self, name: str, change: Callable[[], None] | None) -> None:
        """Do this to the weights whenever they are gathered, with them in place; None: nothing any more."""
        self._whole = None
        self.changes.pop(name, None)
        if change is not None:
            self.changes[name] = change

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within this block, the layer has its weights."""
        self._put(self._gathered())
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._put(None)

    # -- passes --------------------------------------------------------------------------------------------------------

    def _enter(self, *_: Any) -> None:
        if current().size == 1:
            raise ValueError(
                f"fsdp: True: the LM is spread over {self._processes.size} processes, and one of them alone was about to run it; "
                "give fsdp: False"
            )
        used: list[Any] = [self.whole()]
        if torch.is_grad_enabled():
            used.append(saved_tensors_hooks(self._pack, self._unpack))
        for context in used:
            context.__enter__()
            self._pass.append(context)

    def _leave(self, *_: Any) -> None:
        while self._pass:
            self._pass.pop().__exit__(None, None, None)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        whole = self._whole
        if whole is None or tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return tensor
        return _Saved(tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        whole = self._gathered()
        found = torch.empty(0, dtype=saved.dtype, device=whole.device)
        return found.set_(whole.untyped_storage(), saved.offset, saved.size, saved.stride)

    # -- weights -------------------------------------------------------------------------------------------------------

    def _gathered(self) -> Tensor:
        if self._whole is None:
            held, ShardedLayer._held = ShardedLayer._held, self
            if held is not None:
                held._whole = None
            while (wanted := self._processes.smallest(self._number)) != self._number:
                _layers[wanted]._gather()
            self._whole = self._gather()
            if self.changes:
                whole, self._whole = self._whole, None  # until all changes are made
                with torch.no_grad():
                    self._put(whole)
                    try:
                        for change in self.changes.values():
                            change()
                    finally:
                        self._put(None)
                self._whole = whole
        return self._whole

    def _gather(self) -> Tensor:
        """The bytes of all processes, without changes; each process calls it for the same layer."""
        return self._processes.whole(self.part)

    def _put(self, whole: Tensor | None) -> None:
        """Give the modules their weights, or take them away."""
        for module, name, weight, start, end in self._places:
            found = weight
            if whole is not None:
                found = nn.Parameter(whole[start:end].view(weight.dtype).view(weight.shape), requires_grad=False)
            module._parameters[name] = found


@contextmanager
def whole(layer: nn.Module) -> Iterator[None]:
    """Within this block, a layer has its weights, also if it is sharded and its ``forward`` is called directly."""
    found: ShardedLayer | None = getattr(layer, "sharded", None)
    if found is None:
        yield
        return
    with found.whole():
        yield


def sharded_layer(weight: Tensor) -> ShardedLayer | None:
    """The sharded layer that a weight belongs to, if any."""
    return getattr(weight, "sharded", None)


def shard(model: Any, processes: Processes, device: torch.device) -> Any:
    """Spread the decoder layers of a frozen LM of ``transformers`` over the processes; the rest of it is moved to ``device``.

    Embeddings, the head and weights that a layer shares with another part of the LM stay whole. Layers are moved one by one.

    Raises:
        ValueError: the LM's class has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(module) for layer in found for module in layer.modules() if module is not layer}
    layers = [layer for layer in found if id(layer) not in inner]
    if not layers:
        raise ValueError(
            f"fsdp: True: {type(model).__name__} has no layers that can be sharded; give fsdp: False and load_in_4bit: True, or "
            "one process and device_map: auto"
        )
    users, size = _users(model), 0
    for layer in layers:
        own = _users(layer)
        weights = {weight for weight in layer.parameters() if own[weight] == users[weight]}
        size += len(ShardedLayer(layer, weights, processes, device).part)
    model.to(device)

    def help_others() -> None:
        while (wanted := processes.smallest(NOTHING)) != NOTHING:
            _layers[wanted]._gather()

    before_meeting(help_others)
    rest = sum(w.numel() * w.element_size() for w in model.parameters() if sharded_layer(w) is None)
    logger.info(
        f"fsdp: each of {processes.size} processes holds {size / 2**30:.2f} GB of the {len(layers)} layers, and all of the "
        f"other {rest / 2**30:.2f} GB of the LM"
    )
    return model


def _users(module: nn.Module) -> Counter[nn.Parameter]:
    """How many modules use each weight."""
    return Counter(weight for part in module.modules() for weight in part.parameters(recurse=False))


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
