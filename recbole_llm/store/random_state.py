"""The state of the random generators of torch, numpy and Python."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of the torch (CPU and every GPU), numpy and Python generators, as tensors and JSON values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return tensors, {
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def restore_rng(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Restore the state from :func:`rng_state`."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        states = [tensors[f"cuda{i}"] for i in range(torch.cuda.device_count()) if f"cuda{i}" in tensors]
        torch.cuda.set_rng_state_all(states)
    name, keys, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the state of all random generators at the end of the block."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(*state)
