"""Dropout of LoRA that is drawn once for each distinct input, such as that of the query, key and value projections.

peft draws a mask for each adapted layer. One mask for all layers that read the same tensor does not change the distribution of
each layer's input, but makes the inputs dependent. It saves two thirds of the masks and of the stored activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 2**16  # a mask is drawn from 16 random bits for each element


class SharedInputs(nn.Module):
    """A ``lora_dropout`` of several layers: in training, an input is cast and dropped once, whichever layers read it.

    Args:
        p: share of the elements that are dropped.
        dtype: of the result, that of the adapters.
    """

    def __init__(self, p: float, dtype: torch.dtype):
        super().__init__()
        self.p, self._dtype = p, dtype
        self._last: tuple[ReferenceType[Tensor], tuple[bool, bool], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] in the dtype of the adapters, after dropout in training mode."""
        mode = self.training, torch.is_grad_enabled()
        if self._last is not None and self._last[0]() is x and self._last[1] == mode:
            return self._last[2]
        found = x.to(self._dtype)
        if self.training and self.p:
            found = _Dropout.apply(found, self.p) if x.device.type == "cpu" else F.dropout(found, self.p)
        if found is not x:
            self._last = ref(x, self.forget), mode, found
        return found

    def forget(self, _: Any = None) -> None:
        """Draw the next input anew, also if it is the last one again."""
        self._last = None

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Dropout(torch.autograd.Function):
    """Dropout on a CPU: PyTorch's draws one number for each element, four times as slowly, and keeps the mask as floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * _LEVELS)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # type: ignore[arg-type]
        keep = (words.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = _LEVELS / (_LEVELS - dropped)
        return keep.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (keep,) = ctx.saved_tensors
        return keep.to(gradient.dtype).mul_(ctx.scale).mul_(gradient), None


def share_inputs(layers: Iterable[Any]) -> None:
    """Give each adapter of peft's LoRA layers one :class:`SharedInputs`.

    The layers then do not cast their inputs themselves, which would make a tensor of its own for each layer.
    """
    shared: dict[tuple[str, float, torch.dtype], SharedInputs] = {}
    for layer in layers:
        if not isinstance(layer.get_base_layer(), nn.Linear):
            continue
        layer.cast_input_dtype_enabled = False
        for name, matrix in layer.lora_A.items():
            p, dtype = getattr(layer.lora_dropout[name], "p", 0.0), matrix.weight.dtype
            layer.lora_dropout[name] = shared.setdefault((name, p, dtype), SharedInputs(p, dtype))
