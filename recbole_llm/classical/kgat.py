"""RecBole's KGAT without dgl: no release for Python 3.11 has the function that RecBole calls for the model's first attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix


@contextlib.contextmanager
def without_dgl(dataset: Any, model_class: type) -> Iterator[None]:
    """Give KGAT, which is built meanwhile, its graph as a matrix, and compute its first attention from that."""
    graph, original = dataset.ckg_graph, model_class.init_graph  # type: ignore[attr-defined]
    dataset.ckg_graph = lambda form="coo", value_field=None: graph("coo" if form == "dgl" else form, value_field)
    model_class.init_graph = lambda self: first_attention(self.ckg, self.n_relations).to(self.device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del dataset.ckg_graph
        model_class.init_graph = original  # type: ignore[attr-defined]


def attend(model: Any) -> None:
    """Compute KGAT's attention from its weights, as RecBole does after each epoch. Other models have none."""
    if hasattr(model, "update_attentive_A"):
        with torch.no_grad():
            model.update_attentive_A()


def first_attention(edges: coo_matrix, relations: int) -> torch.Tensor:
    """The sum over relations of the adjacency matrices, each of whose rows is divided by the row's number of such edges.

    Args:
        edges: their relations, by head and tail [N, N]; relation 0 is RecBole's padding and has none.
        relations: their number, with padding.

    Returns:
        A sparse matrix [N, N].
    """
    heads, tails, kinds = (part[edges.data > 0].astype(np.int64) for part in (edges.row, edges.col, edges.data))
    degrees = np.bincount(heads * relations + kinds)
    values = torch.from_numpy(1 / degrees[heads * relations + kinds]).float()
    places = torch.from_numpy(np.stack([heads, tails]))
    return torch.sparse_coo_tensor(places, values, edges.shape, check_invariants=False).coalesce()
