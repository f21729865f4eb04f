"""Products of float32 matrices: TF32 on an accelerator, and oneDNN in place of MKL on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHOICES = ("highest", "high", "medium")
WIDE = 256


def set_precision(value: str, device: torch.device, width: int) -> None:
    """Set how float32 products are computed in this process.

    On an accelerator, as ``torch.set_float32_matmul_precision``. On a CPU the results keep the accuracy of float32, but torch's
    library for them, MKL, is slower than oneDNN on processors of AMD (``benchmarks/precision.py`` measures it). torch asks oneDNN
    only if less accuracy is allowed ("medium"), so that is set where :func:`onednn_is_exact`.

    Args:
        value: ``highest`` leaves a CPU as it is.
        width: of the run's LM; 0 without one. oneDNN prepares each new shape, which costs more than it saves below :data:`WIDE`.

    Raises:
        ValueError: another value.
    """
    if value not in CHOICES:
        raise ValueError(f"float32_matmul_precision: {value!r} is unknown; choose highest, high or medium")
    if device.type == "cpu":
        value = "medium" if width >= WIDE and value != "highest" and onednn_is_exact() else "highest"
    torch.set_float32_matmul_precision(value)


@functools.cache
def onednn_is_exact() -> bool:
    """Whether products at "medium" have the accuracy of float32 on this CPU; where it has AMX, oneDNN rounds to bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        return all(_error(rows) < 1e-5 for rows in (1, 64, 1024))
    finally:
        torch.set_float32_matmul_precision(before)


def _error(rows: int) -> float:
    """The largest relative error (Frobenius norm) of the products of a linear layer for ``rows`` vectors, both ways."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, 512, generator=generator), torch.randn(1024, 512, generator=generator)
    y = torch.randn(rows, 1024, generator=generator)
    pairs: list[tuple[Tensor, Tensor]] = [(x, w.T), (y, w), (y.T, x)]
    return max(float((a @ b - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()) for a, b in pairs)
