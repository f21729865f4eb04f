"""Histories as padded rows of title tokens: the training batches of the builtin LM.

In each epoch, every history is cut into windows of titles at a new random offset. A row is the begin token and the titles of
one window; rows of similar length share a batch. The seed determines all batches. They are planned in advance as start and
end positions, so that training can resume at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

Histories = Sequence[Sequence[int] | np.ndarray]
POOL = 256  # rows that are sorted by length


class WindowBatches:
    """Token rows [B, T] by step, right-padded.

    Args:
        answers: tokens of the title and of its end, by item id.
        histories: item ids of each user in time order.
        begin, pad: the first token of every row, and the padding token.
        window: titles in a row.
        batch_tokens: maximum number of tokens in a batch, padding included (a longer row is a batch of its own).
        tokens, epochs: the plan ends after this many predicted tokens, or epochs if that is earlier.
    """

    def __init__(
        self,
        answers: Sequence[list[int]],
        histories: Histories,
        *,
        begin: int,
        pad: int,
        window: int,
        batch_tokens: int,
        tokens: int,
        epochs: int,
        seed: int,
    ):
        self._answers, self._begin, self._pad = answers, begin, pad
        self._window, self._batch_tokens, self._seed = window, batch_tokens, seed
        self._items = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])  # [N]
        self._ends = np.cumsum([len(history) for history in histories]).tolist()
        lengths = np.array([len(answer) for answer in answers])
        self._before = np.concatenate([[0], np.cumsum(lengths[self._items])])  # tokens before each item, [N + 1]
        self._plan = list(self._until(tokens, epochs))

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> Tensor:
        windows = (self._items[first:last] for first, last in self._plan[step])
        rows = [[self._begin, *chain.from_iterable(self._answers[item] for item in items)] for items in windows]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, self._pad)  # [B, T]

    def _until(self, tokens: int, epochs: int) -> Iterator[np.ndarray]:
        for epoch in range(epochs):
            for batch in self._epoch(epoch):
                if tokens <= 0:
                    return
                tokens -= int(self._sizes(batch).sum())
                yield batch

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """Batches of windows [B, 2] that cover each position of all histories once."""
        rng = np.random.default_rng([self._seed, epoch])
        windows = rng.permutation(np.array(list(self._cut_histories(rng))))  # [W, 2]
        batches: list[np.ndarray] = []
        for start in range(0, len(windows), POOL):
            pool = windows[start : start + POOL]
            batches += self._cut_pool(pool[np.argsort(self._sizes(pool), kind="stable")])
        return [batches[place] for place in rng.permutation(len(batches))]

    def _cut_histories(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        start = 0
        for end in self._ends:
            first = int(rng.integers(self._window)) + 1 if end - start > self._window else self._window
            cuts = [start, *range(start + first, end, self._window), end]
            yield from ((a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b)
            start = end

    def _cut_pool(self, windows: np.ndarray) -> Iterator[np.ndarray]:
        first = 0
        for last, size in enumerate(self._sizes(windows).tolist()):
            if last > first and (last + 1 - first) * (size + 1) > self._batch_tokens:
                yield windows[first:last]
                first = last
        yield windows[first:]

    def _sizes(self, windows: np.ndarray) -> np.ndarray:
        return self._before[windows[:, 1]] - self._before[windows[:, 0]]  # [B]
