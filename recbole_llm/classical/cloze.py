"""``train_mode: sequence`` for BERT4Rec: its cloze task on whole sequences, as in its paper (Sun et al., CIKM 2019, section 3.6).

RecBole masks items in each of the n - 1 prefixes of a history, so an epoch costs n - 1 forward passes per user. Here a history
is cut into windows of ``MAX_ITEM_LIST_LENGTH`` items, and RecBole's transform masks each window once per epoch, so training
needs more epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.classical.averaging import SteadyTraining
from recbole_llm.classical.fast_transformer import make_fast
from recbole_llm.classical.losses import SequenceLoss
from recbole_llm.classical.sequence import looked_up_once, of_similar_length
from recbole_llm.classical.windows import WindowLoader, training_histories, window_ends

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

MASKED_MODELS = ("BERT4Rec",)


class MaskedLoader(WindowLoader):
    """Batches of masked windows; ``train_batch_size`` counts their items."""

    def __init__(self, histories: list[Tensor], transform: Callable, dataset: Any, config: Any):
        longest = config["MAX_ITEM_LIST_LENGTH"]
        rows = [history[max(end - longest, 0) : end] for history in histories for end in window_ends(len(history), longest)]
        self.lengths = torch.tensor([len(row) for row in rows])  # [N]
        self.items = torch.stack([pad(row, (0, longest - len(row))) for row in rows])  # [N, L]
        self.fields = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"], config["ITEM_LIST_LENGTH_FIELD"]
        self.transform, self.dataset = transform, dataset
        per_batch = config["train_batch_size"] * len(rows) / self.lengths.sum().item()
        super().__init__(len(rows), per_batch, config["seed"], shuffle=config["shuffle"])

    def _batch(self, rows: Tensor, generator: torch.Generator) -> Interaction:
        from recbole.data.interaction import Interaction

        windows = dict(zip(self.fields, (self.items[rows], self.lengths[rows]), strict=True))
        while True:  # of a few short windows, no mask may count, and the mean over none is NaN
            batch = self.transform(self.dataset, Interaction(windows))
            if (batch["MASK_INDEX"] > 0).any():
                return batch


def masked_loss(model: Any, loss: SequenceLoss, interaction: Interaction) -> Tensor:
    """``loss`` over the masked items of a batch, at the places that BERT4Rec's own loss counts; a scalar.

    The model reads windows of similar length together, without the padding behind the longest of them.
    """
    masked, states, targets = interaction[model.MASK_ITEM_SEQ], [], []  # [B, L]
    with looked_up_once(model.item_embedding, masked):
        for rows, width in of_similar_length(model, interaction[model.ITEM_SEQ_LEN], masked.shape[1]):
            index = interaction[model.MASK_INDEX][rows]  # [b, M], 0 for none, so a mask at place 0 does not count
            row, column = index.nonzero(as_tuple=True)  # [T], [T]
            states.append(model(masked[rows][:, :width])[row, index[row, column]])  # [T, H]
            targets.append(interaction[model.POS_ITEMS][rows][row, column])
    return loss(torch.cat(states), model.item_embedding.weight[: model.n_items], model.output_bias, torch.cat(targets))


class MaskedTraining(SteadyTraining):
    """Mixin before RecBole's ``Trainer``: epochs run over masked windows."""

    def __init__(self, config: Any, model: Any):
        SequenceLoss.of(config).check(model)
        super().__init__(config, make_fast(model, causal=False))

    def targets_of(self, interaction: Any) -> Tensor:
        return (interaction[self.model.MASK_INDEX] > 0).sum(1)

    @classmethod
    def batches(cls, config: Any, model: Any, train_data: Any) -> tuple[MaskedLoader, Callable]:
        """The batches of an epoch, and the loss of each."""
        histories, loss = training_histories(train_data.dataset), SequenceLoss.of(config)
        loader = MaskedLoader(histories, train_data.transform, train_data.dataset, config)
        return loader, model.calculate_loss if loss.is_recboles else partial(masked_loss, model, loss)


class MaskedPrefixes:
    """Mixin before RecBole's ``Trainer`` for ``train_mode: prefix``: in a batch of short rows, no mask may count."""

    model: Any

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Callable | None = None, show_progress: bool = False
    ) -> Any:
        loss = loss_func or partial(counted_loss, self.model)
        return super()._train_epoch(train_data, epoch_idx, loss, show_progress)  # type: ignore[misc]


def counted_loss(model: Any, interaction: Interaction) -> Tensor:
    """BERT4Rec's own loss, and 0 where it would be NaN, the mean over no mask; of rows of one item, no draw has any."""
    if (interaction[model.MASK_INDEX] > 0).any():
        return model.calculate_loss(interaction)
    return 0.0 * model.output_bias.sum()
