"""What a training saves beside its weights, and when, so that a run that is killed resumes from it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

SAVING = 0.05  # largest share of the time of a training that its saves may take


def next_save(began: float, least: float) -> float:
    """When to save next, after a save that began at ``began``: ``least`` seconds later, and so late that saves take at most
    ``SAVING`` of the time; at once if ``least`` is 0. Times are of the monotonic clock."""
    ended = time.monotonic()
    return ended + max(least, (ended - began) * (1 / SAVING - 1)) if least else ended


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's per-parameter state as flat named tensors (``<index>.<key>``)."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the state from :func:`optimizer_tensors`; the hyper-parameters of groups do not change."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
