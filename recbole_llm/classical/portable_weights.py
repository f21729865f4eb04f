"""The weights of a checkpoint as safetensors, for people who have the same dataset: no optimiser, no settings, no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_OTHER, _STATE = "other/", "state/"
COMPUTED = "restore_"
"""How names of vectors begin that LightGCN and others compute from the weights, and compute again."""


def write(checkpoint: Path, file: Path) -> None:
    """Write the weights of a checkpoint of this package to a safetensors file.

    Raises:
        ValueError: it cannot be read without executing code, or the model keeps parts of the data beside its weights.
    """
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights, others = found["state_dict"], found.get("other_parameter") or {}
    except Exception as error:
        raise ValueError(f"{checkpoint}: not a checkpoint that can be read without executing code; train again") from error
    tensors = {f"{_STATE}{name}": value for name, value in weights.items()}
    plain: dict[str, Any] = {}
    for name, value in others.items():
        if name.startswith(COMPUTED):
            plain[name] = None
        elif isinstance(value, torch.Tensor):
            tensors[f"{_OTHER}{name}"] = value
        elif value is None or isinstance(value, bool | int | float | str):
            plain[name] = value
        else:
            raise ValueError(
                f"{checkpoint}: the model keeps {name} beside its weights, which contains interactions of users or other data, "
                "so it cannot be shared; share how it is trained: its settings"
            )
    # clone: safetensors rejects shared storage
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(copies, file, metadata={"other_parameter": json.dumps(plain)})


def state_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The weights among the tensors of a file of :func:`write`; None if it is of another kind."""
    if not tensors or not all(name.startswith((_STATE, _OTHER)) for name in tensors):
        return None
    return {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}


def others_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors beside the weights among those of a file of :func:`write`."""
    return {name.removeprefix(_OTHER): value for name, value in tensors.items() if name.startswith(_OTHER)}


def read(file: Path, device: torch.device | str) -> dict[str, Any]:
    """The ``state_dict`` and ``other_parameter`` of a file of :func:`write`.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
            plain = json.loads((found.metadata() or {}).get("other_parameter", "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); get it again") from error
    others = {**(plain or {}), **others_of(tensors)}
    return {"state_dict": state_of(tensors) or {}, "other_parameter": others or None}
