"""KGAT without dgl."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix

from recbole_llm.classical.kgat import first_attention


def test_the_first_attention_is_the_sum_of_the_adjacency_matrices_normalised_by_relation() -> None:
    rng, nodes, relations = np.random.default_rng(0), 12, 4
    heads, tails, kinds = rng.integers(0, nodes, 60), rng.integers(0, nodes, 60), rng.integers(0, relations, 60)
    expected = np.zeros((nodes, nodes))
    for kind in range(1, relations):  # relation 0 is padding
        own = np.zeros((nodes, nodes))
        np.add.at(own, (heads[kinds == kind], tails[kinds == kind]), 1)  # an edge may occur twice
        expected += own / np.maximum(own.sum(axis=1, keepdims=True), 1)
    found = first_attention(coo_matrix((kinds, (heads, tails)), shape=(nodes, nodes)), relations)
    assert found.is_sparse and torch.allclose(found.to_dense(), torch.tensor(expected).float())
