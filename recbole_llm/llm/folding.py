"""Adapters folded into the weights of their base model, ``W + sum_i w_i s_i B_i A_i``, so that evaluation costs that of the base.

The original weights are copied to host memory once and written back when the folding ends. Subtracting the update instead would
not restore them: rounding errors add up, in bfloat16 above all. Weights of a sharded layer are changed whenever they are
gathered, and need no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.compat import available_memory_bytes
from recbole_llm.llm.sharding import sharded_layer

logger = getLogger()

HOST_MEMORY_SHARE = 0.5  # the copies may take this share of the free host memory
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 that the dtype has no room for
_GOLDEN = 40503  # 2**16 times the golden ratio: its multiples are spread evenly, whichever of them are next to each other


class Folding:
    """The adapted layers of one model, whose weights can have adapters folded in.

    Args:
        model: the base model, with peft's layers in it.
        layers: peft's LoRA layers by module name.

    Attributes:
        possible: False for quantised, shared or offloaded weights, updates that are not exactly ``s B A``, and if host memory
            is too small for a copy of the adapted weights. Adapters then stay beside the weights.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]):
        self._layers = dict(layers)
        self._originals: dict[str, Tensor] = {}
        self.active = False
        self.possible = _exact(self._layers.values()) and not _shared(model, self._layers.values()) and self._fits()

    def fold(self, names: Iterable[str]) -> None:
        """Write the original weights plus the updates of these adapters, at their current scales, into the base model."""
        names = list(names)
        self.active = True  # from the first weight on: a folding that fails midway is restored, too
        for name, layer in self._layers.items():
            weight = _weight(layer)
            if sharded := sharded_layer(weight):
                sharded.change(name, partial(_fold, layer, names))
            else:
                _fold(layer, names, self._originals.setdefault(name, weight.detach().to("cpu", copy=True)))

    def restore(self) -> None:
        """Write the original weights back, bit for bit."""
        with torch.no_grad():
            for name, original in self._originals.items():
                _weight(self._layers[name]).copy_(original)
        for name, layer in self._layers.items():
            if sharded := sharded_layer(_weight(layer)):
                sharded.change(name, None)
        self.active = False

    def _fits(self) -> bool:
        copied = (weight for weight in map(_weight, self._layers.values()) if sharded_layer(weight) is None)
        size = sum(weight.numel() * weight.element_size() for weight in copied)
        free = available_memory_bytes()
        if size <= HOST_MEMORY_SHARE * free:
            return True
        logger.info(
            f"evaluation: adapters are not folded into the weights, a copy takes {size / 2**30:.1f} of the {free / 2**30:.1f} GB "
            "of free memory; scores are the same, at a higher cost"
        )
        return False


@torch.no_grad()
def _fold(layer: Any, names: Iterable[str], original: Tensor | None = None) -> None:
    """Write the original weight, by default that of now, plus the updates of these adapters into the base model."""
    weight = _weight(layer)
    original = weight if original is None else original
    updates = [layer.get_delta_weight(adapter).float() for adapter in names if adapter in layer.scaling]
    weight.copy_(rounded(sum(updates, start=original.to(weight.device).float()), weight.dtype))  # summed in fp32


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values of the size of ``values``, all of which ``dtype`` has: unbiased, and the same at every call.

    The nearest ones would lose most of an adapter: weights of an LM are values of ``dtype``, and an update of less than half of
    the step to the next one leaves them as they are. So a value goes up or down as often as it is near, and those that an
    update leaves alone stay.
    """
    if (bits := _DROPPED.get(dtype)) is None:
        return values
    spread = (torch.arange(values.numel(), dtype=torch.int32, device=values.device) * _GOLDEN & 0xFFFF) >> (16 - bits)
    raised = values.contiguous().view(torch.int32) + spread.view(values.shape)
    return raised.bitwise_and_(-1 << bits).view(torch.float32)


def _weight(layer: Any) -> Tensor:
    return layer.get_base_layer().weight


def _exact(layers: Iterable[Any]) -> bool:
    """Whether each layer is a plain linear one, in memory, and its updates are exactly ``s B A``."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    def exact(layer: Any) -> bool:
        base = layer.get_base_layer()
        plain = type(layer) is Linear and type(base) in (nn.Linear, Conv1D) and not layer.lora_variant
        in_memory = plain and base.weight.is_floating_point() and base.weight.device.type != "meta"
        return in_memory and not any(layer.lora_bias.values())

    return all(map(exact, layers))


def _shared(model: nn.Module, layers: Iterable[Any]) -> bool:
    """Whether another module, such as the embedding, uses the weight of an adapted layer."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return any(users[id(_weight(layer))] > 1 for layer in layers)
