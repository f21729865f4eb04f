"""``train_mode: sequence`` for BERT4Rec: its cloze task on whole sequences, as in its paper (Sun et al., CIKM 2019, section 3.6).

RecBole masks items in each of the n - 1 prefixes of a history, so that an epoch costs n - 1 passes a user. Here a history is cut
into windows of ``MAX_ITEM_LIST_LENGTH`` items, and an epoch masks each window once, by RecBole's own transform: the number of
epochs is for the user to raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.classical.sequence import training_histories, window_ends

MASKED_MODELS = ("BERT4Rec",)


class MaskedLoader:
    """Batches of masked windows, in an order drawn from ``(seed, epoch)``; ``train_batch_size`` counts their items."""

    def __init__(self, histories: list[Tensor], transform: Callable, dataset: Any, config: Any):
        longest = config["MAX_ITEM_LIST_LENGTH"]
        rows = [history[max(end - longest, 0) : end] for history in histories for end in window_ends(len(history), longest)]
        self.lengths = torch.tensor([len(row) for row in rows])  # [N]
        self.items = torch.stack([pad(row, (0, longest - len(row))) for row in rows])  # [N, L]
        self.batch_size = max(1, round(config["train_batch_size"] * len(rows) / self.lengths.sum().item()))
        self.fields = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"], config["ITEM_LIST_LENGTH_FIELD"]
        self.transform, self.dataset, self.seed, self.epoch = transform, dataset, config["seed"], 0

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        from recbole.data.interaction import Interaction

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for rows in torch.randperm(len(self.items), generator=generator).split(self.batch_size):
            windows = dict(zip(self.fields, (self.items[rows], self.lengths[rows]), strict=True))
            yield self.transform(self.dataset, Interaction(windows))


class MaskedTraining:
    """Mixin before RecBole's ``Trainer``: its epochs run over masked windows; all else is RecBole's."""

    _batches: MaskedLoader | None = None

    def _train_epoch(self, train_data: Any, epoch_idx: int, *rest: Any, **more: Any) -> float | tuple[float, ...]:
        if self._batches is None:
            histories = training_histories(train_data.dataset)
            self._batches = MaskedLoader(histories, train_data.transform, train_data.dataset, self.config)  # type: ignore[attr-defined]
        self._batches.epoch = epoch_idx
        return super()._train_epoch(self._batches, epoch_idx, *rest, **more)  # type: ignore[misc]
