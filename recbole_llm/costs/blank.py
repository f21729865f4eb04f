"""Tensors with a shape but no values, as an LM that computes nothing returns them.

The code that trains and scores runs on them unchanged, so its work can be counted without doing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

_READS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.numpy, Tensor.equal, torch.equal)
_VIEWS = ("split", "flatten", "unsqueeze", "unbind", "detach", "view", "expand")


class Blank(Tensor):
    """Zeros of any shape in the memory of one number. Every operation on them gives another blank of the right shape.

    Other tensors of an operation, such as indices, are real. A result that code reads as a number or a list is 0.
    """

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Blank:
        """A blank of this shape, on the CPU."""
        return torch.zeros((), dtype=dtype).expand(tuple(shape)).as_subclass(Blank)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", "")
            if func in _READS or name == "__get__":  # values, and attributes such as shape and device
                return func(*args, **kwargs)
            if func is Tensor.cpu or name in _VIEWS:  # blanks are on the CPU, and views of one number cost nothing
                found = args[0] if func is Tensor.cpu else func(*args, **kwargs)
                return tree_map(lambda x: x.as_subclass(Blank) if isinstance(x, Tensor) else x, found)
            if func is cross_entropy and kwargs.get("reduction") != "none":
                return Blank.of((), args[0].dtype)
            if func is Tensor.logsumexp and args[1:] == (-1,):  # called often, and slow on ``meta``
                return Blank.of(args[0].shape[:-1], args[0].dtype)
            if name == "__getitem__":
                args = args[0], _without_masks(args[1])
            found = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
            return tree_map(lambda x: Blank.of(x.shape, x.dtype) if isinstance(x, Tensor) else x, found)


def _shape_only(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _without_masks(index: Any) -> tuple[Any, ...]:
    """An index in which the positions stand for boolean masks, whose values determine the shape of the result."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        is_mask = isinstance(part, Tensor) and not isinstance(part, Blank) and part.dtype == torch.bool
        found += part.nonzero(as_tuple=True) if is_mask else [part]
    return tuple(found)
