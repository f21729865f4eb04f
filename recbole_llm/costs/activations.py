"""Bytes that a forward pass keeps for the gradient, counted on a model without memory.

The pass runs on the device ``meta``, where tensors have shapes only, with hooks on what autograd saves. A length is taken at which
attention's own share is small; fused attention keeps no matrix of scores, as on the devices that training runs on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 32


def kept_bytes(model: Any, rows: int = 1, length: int = LENGTH) -> int:
    """Bytes that autograd keeps of a pass [rows, length] through a model on ``meta`` in ``train()``, weights aside."""
    weights = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    dtype = model.get_input_embeddings().weight.dtype
    mask = torch.zeros(rows, 1, length, length, dtype=dtype, device="meta")
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
