"""The nearest items of users by faiss: exact, or an index for large catalogues, whose recall is measured.

Legend: B users, I items, N items that are searched, D width of the vectors.
"""

from __future__ import annotations

import re
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.evaluation.products import Products

logger = getLogger()

EXACT = "exact"
RECALL, RECALL_AT = 0.95, 10
"""An index spends more effort on each user until it finds this share of the 10 best items of the sample."""
SAMPLE = 256
"""Users by whom the recall is measured."""

_EFFORT = {"IVF": "nprobe", "HNSW": "efSearch"}  # faiss's parameters, by a part of the factory string
_PLACE = re.compile(r"^Error in .* at \S+:\d+: (Error: '.*?' failed: )?")  # in the source of faiss
_EFFORTS = tuple(2**power for power in range(3, 11))


class ItemIndex:
    """Finds the items with the largest products.

    Args:
        kind: ``exact`` (``faiss.IndexFlatIP``), or a string of ``faiss.index_factory`` such as ``IVF1024,Flat`` or ``HNSW32``.
        sample: interaction of users by whom the recall of other indexes than ``exact`` is measured.

    Attributes:
        recall: share of the 10 best items of each user of the sample that the index finds; 1 for ``exact``.
        effort: parameter and value of faiss with which it does; None for an index without one.

    Raises:
        ValueError: faiss cannot make such an index of this catalogue.
    """

    def __init__(self, products: Products, kind: str, sample: Any):
        import faiss

        self._products, self.kind, self.is_exact = products, kind, kind == EXACT
        self.recall = 1.0
        self.effort: tuple[str, int] | None = None
        vectors = np.ascontiguousarray(products.items[1:].cpu().numpy())  # [I - 1, D], without the padding item
        try:
            self._index = faiss.index_factory(vectors.shape[1], "Flat" if self.is_exact else kind, faiss.METRIC_INNER_PRODUCT)
            self._index.train(vectors)
            self._index.add(vectors)
        except RuntimeError as error:
            reason = _PLACE.sub("", str(error).strip().splitlines()[-1])
            raise ValueError(
                f"--index={kind}: faiss cannot make this index of {len(vectors):,} vectors of width {vectors.shape[1]} "
                f"({reason}); give exact, HNSW32, or IVF1024,Flat with fewer lists than items"
            ) from error
        if not self.is_exact:
            users = _array(products.users(sample))
            _, best = faiss.knn(users, vectors, min(RECALL_AT, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
            self._tune(users, best)

    def _tune(self, users: np.ndarray, best: np.ndarray) -> None:
        """Raise the effort until the recall of ``best`` [B, 10] of users [B, D] is reached."""
        import faiss

        name = next((name for part, name in _EFFORT.items() if part in self.kind), None)
        for effort in _EFFORTS if name else (0,):
            if name:
                faiss.ParameterSpace().set_index_parameter(self._index, name, effort)
                self.effort = name, effort
            _, found = self._index.search(users, best.shape[1])
            self.recall = float((found[:, :, None] == best[:, None, :]).any(1).mean())
            if self.recall >= RECALL:
                return
        logger.warning(
            f"--index={self.kind}: it finds {self.recall:.1%} of the {RECALL_AT} best items, less than {RECALL:.0%}, so lists "
            f"lack items that the model ranks higher; give --index={EXACT}, or another index"
        )

    def __str__(self) -> str:
        if self.is_exact:
            return "index exact"
        effort = f" ({' '.join(map(str, self.effort))})" if self.effort else ""
        return f"index {self.kind}{effort}: recall@{RECALL_AT} {self.recall:.3f} of the exact items, by at most {SAMPLE} users"

    def search(self, interaction: Any, number: int) -> tuple[Tensor, Tensor]:
        """Internal ids and scores [B, N] of the best items, best first; minus infinity where the index finds no more items."""
        scores, items = self._index.search(_array(self._products.users(interaction)), min(number, self._index.ntotal))
        device = self._products.items.device
        found, products = torch.from_numpy(items).to(device), torch.from_numpy(scores).to(device)
        return found + 1, products.masked_fill(found < 0, -torch.inf)


def _array(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.cpu().numpy())
