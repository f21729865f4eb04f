"""Adapters that have learnt nothing, of the shape of one that has: placebos of a merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE, Adapter, factor_key
from recbole_llm.merging.geometry import norm


def random_like(adapter: Adapter, rng: np.random.Generator) -> Adapter:
    """Gaussian factors of the same shapes, scaled so that ``||dW||`` (Frobenius) of each module is that of ``adapter``."""

    def drawn(shape: torch.Size) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))

    draft = replace(adapter, tensors={key: drawn(tensor.shape) for key, tensor in adapter.tensors.items()})
    for module in adapter.modules:
        size = norm(draft, module)  # 0 if the adapter has lora_alpha: 0
        share = (norm(adapter, module) / size) ** 0.5 if size else 0.0
        for factor in "AB":  # both, so that neither is extreme
            draft.tensors[factor_key(module, factor)] = (draft.tensors[factor_key(module, factor)].double() * share).float()
    return draft


def zero_like(adapter: Adapter) -> Adapter:
    """An adapter of the same shapes that changes nothing."""
    return replace(adapter, tensors={key: torch.zeros_like(tensor) for key, tensor in adapter.tensors.items()})


def write(adapter: Adapter, folder: Path) -> None:
    """Write an ordinary PEFT folder."""
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in adapter.tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True))
