"""Adapters that have learnt nothing: of the shape, and for random ones of the norm, of the adapter that they replace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.merging.random_lora import random_like, write, zero_like
from tests.merging.test_arithmetic import UNEQUAL, dense


@pytest.mark.parametrize("adapter", UNEQUAL, ids=lambda adapter: adapter.name)
def test_a_random_adapter_has_the_dense_norm_of_each_module(adapter: Adapter) -> None:
    drawn = random_like(adapter, np.random.default_rng(0))
    old, new = dense(adapter), dense(drawn)
    assert drawn.config == adapter.config and list(new) == list(old)
    for module in old:
        assert float(new[module].norm()) == pytest.approx(float(old[module].norm()), rel=1e-6)
        cosine = float((new[module] * old[module]).sum() / old[module].norm() ** 2)
        assert abs(cosine) < 0.6  # another direction, in few dimensions


def test_its_factors_are_balanced_gaussians_of_the_seed(tmp_path: Path) -> None:
    one, same, other = (random_like(UNEQUAL[0], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(tensor, same.tensors[key]) for key, tensor in one.tensors.items())
    assert not any(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
    sizes = [tensor.std().item() for tensor in one.tensors.values()]
    assert max(sizes) < 3 * min(sizes)
    write(one, tmp_path)
    read = read_adapter(tmp_path)
    assert all(torch.equal(tensor, read.tensors[key]) for key, tensor in one.tensors.items())


def test_a_module_without_an_update_gets_none() -> None:
    source = UNEQUAL[0]
    silent = Adapter(source.config, {key: tensor * ("layers.1" not in key) for key, tensor in source.tensors.items()}, "s")
    drawn = dense(random_like(silent, np.random.default_rng(0)))
    assert {module: bool(delta.any()) for module, delta in drawn.items()} == {m: "layers.1" not in m for m in drawn}
    assert not any(delta.any() for delta in dense(zero_like(source)).values())
