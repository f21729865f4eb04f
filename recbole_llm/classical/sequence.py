"""``train_mode: sequence``: train RecBole's causal models on whole sequences, one forward pass for many targets.

RecBole cuts a history ``i1 i2 ... in`` into its n - 1 prefixes and runs the model on each, to read one state and
predict one next item. In a causal model the state at position j depends on the first j items alone, so a single pass
over a window of ``MAX_ITEM_LIST_LENGTH`` items yields the states of all its prefixes, and the same (prefix, next item)
pairs cost a fraction of the work. SASRec was trained like this in its paper (Kang & McAuley, ICDM 2018, section III-E).

The model's own ``calculate_loss`` is used, unless ``sequence_loss`` names another. During one call, two methods of the instance
are replaced: ``gather_indexes`` returns every position instead of the last, and ``forward`` returns these states. Terms that the
model adds to its loss are included (NextItNet's regulariser). Where windows and prefixes coincide, the loss equals RecBole's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recbole_llm.classical.averaging import SteadyTraining
from recbole_llm.classical.fast_transformer import has_attention, make_fast
from recbole_llm.classical.losses import SequenceLoss
from recbole_llm.classical.windows import WindowLoader, Windows, training_histories, windows
from recbole_llm.config.key_groups import SEQUENCE_SWITCHES

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

RECBOLES = SequenceLoss()
POSITIONS = 1024
"""Positions in a forward pass on a CPU, at least: fewer make the matrix products slow."""


# -- states and loss ---------------------------------------------------------------------------------------------------


@contextmanager
def _replaced(model: nn.Module, **methods: Callable[..., Tensor]) -> Iterator[None]:
    """Replace methods of this instance within a ``with`` block."""
    attributes = vars(model)
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(before)


def _before_gather(model: nn.Module, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """States of a model whose ``forward`` ends by gathering the last position."""
    with _replaced(model, gather_indexes=lambda output, _: output):
        return model(item_seq, item_seq_len)  # [B, L, H]


def _nextitnet(model: Any, item_seq: Tensor, _: Tensor) -> Tensor:
    """States of NextItNet, whose ``forward`` gathers nothing but reads the last column."""
    hidden = model.residual_blocks(model.item_embedding(item_seq))  # [B, L, H]
    return model.final_layer(hidden)


def _nextitnet_forward(model: Any, item_seq: Tensor) -> Tensor:
    last = ((item_seq != 0).sum(dim=1) - 1).clamp(min=0)  # [B]; 0 for an empty history
    return model.gather_indexes(_nextitnet(model, item_seq, last), last)  # [B, H]


CAUSAL_MODELS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "SASRec": _before_gather,
    "GRU4Rec": _before_gather,
    "NextItNet": _nextitnet,
    "SASRecF": _before_gather,
    "GRU4RecF": _before_gather,
    "FDSA": _before_gather,
}
"""Class name -> function that returns its states ``[B, L, H]``. Add a causal model of your own here."""


def make_causal(model: nn.Module) -> nn.Module:
    """Check and prepare a model of ``train_mode: sequence`` after it is built; returns ``model``.

    RecBole pads on the right, and its NextItNet reads the last column, padding included, so its states depend on the amount of
    padding. Here it reads the last item, in training and in evaluation. Transformers are made fast, with the same states.

    Raises:
        ValueError: the model is not causal, or its loss is neither CE nor BPR.
    """
    name = type(model).__name__
    if name not in CAUSAL_MODELS:
        raise ValueError(
            f"train_mode: sequence needs a model whose states depend on no later item; {name} is not one of "
            f"{', '.join(CAUSAL_MODELS)}. Use train_mode: prefix."
        )
    loss_type = getattr(model, "loss_type", None)
    if loss_type not in ("CE", "BPR"):
        raise ValueError(f"train_mode: sequence does not support loss_type: {loss_type!r}, only CE and BPR.")
    if name == "NextItNet":
        vars(model)["forward"] = MethodType(_nextitnet_forward, model)
    return make_fast(model)


def sequence_states(model: nn.Module, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """The model's user state after every item.

    Args:
        model: a RecBole model of ``CAUSAL_MODELS``.
        item_seq: internal item ids, padded on the right with 0, ``[B, L]``.
        item_seq_len: numbers of items, ``[B]``.

    Returns:
        ``[B, L, H]``: at ``j``, the model's ``forward`` of the first ``j + 1`` items; undefined at padding.
    """
    return CAUSAL_MODELS[type(model).__name__](model, item_seq, item_seq_len)


def sequence_loss(model: Any, interaction: Interaction, loss: SequenceLoss = RECBOLES) -> Tensor:
    """The loss over all prefixes of a batch of windows, from one forward pass.

    Args:
        model: a RecBole model of ``CAUSAL_MODELS``.
        interaction: as RecBole's training batches, ``item_id_list [B, L]`` and ``item_length [B]``, but with one target
            per position, ``item_id [B, L]``, 0 for none; for BPR ``neg_item_id [B, L]`` too.
        loss: of ``sequence_loss``; RecBole's is the model's own ``calculate_loss``.

    Returns:
        Scalar, the mean over the targets (plus terms that the model adds, such as NextItNet's regulariser).
    """
    fields = [field for field in (model.POS_ITEM_ID, model.NEG_ITEM_ID) if field in interaction]
    states, picked = [], {field: [] for field in fields}  # type: ignore[var-annotated]
    groups = of_similar_length(model, interaction[model.ITEM_SEQ_LEN], interaction[model.ITEM_SEQ].shape[1])
    with looked_up_once(model.item_embedding, interaction[model.ITEM_SEQ]):
        for rows, width in groups:
            part = {field: interaction[field][rows][:, :width] for field in (model.ITEM_SEQ, *fields)}
            trained = part[model.POS_ITEM_ID] != 0  # [rows, width]
            states.append(sequence_states(model, part[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN][rows])[trained])
            for field in fields:
                picked[field].append(part[field][trained])
    found = torch.cat(states)  # [T, H]
    targets = {field: torch.cat(parts) for field, parts in picked.items()}  # [T]
    if not loss.is_recboles:
        return loss(found, model.item_embedding.weight, None, targets[model.POS_ITEM_ID])
    prefixes = {field: interaction[field] for field in (model.ITEM_SEQ, model.ITEM_SEQ_LEN)}
    with _replaced(model, forward=lambda *_: found):
        return model.calculate_loss({**prefixes, **targets})


@contextmanager
def looked_up_once(embedding: nn.Module, items: Tensor) -> Iterator[None]:
    """Let a batch's groups share one lookup of its items: the gradient of a lookup is as large as the catalogue."""
    looked_up = items.unique()  # [U], in order
    vectors = embedding(looked_up)  # [U, H]

    def found(part: Tensor) -> Tensor:
        return nn.functional.embedding(torch.searchsorted(looked_up, part.contiguous()), vectors)

    with _replaced(embedding, forward=found):
        yield


def of_similar_length(model: nn.Module, lengths: Tensor, width: int) -> Iterator[tuple[Tensor | slice, int]]:
    """Rows of a batch in groups, with the width of each, so that attention on a CPU runs over little padding."""
    if lengths.device.type != "cpu" or not has_attention(model):
        yield slice(None), width
        return
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes):
        end = start - (-POSITIONS // sizes[start])
        yield order[start:end], sizes[start]
        start = end


# -- training ----------------------------------------------------------------------------------------------------------


def refuse_sequence_keys(config: Any, reason: str) -> None:
    """Refuse settings of ``train_mode: sequence`` in a run that would not read them.

    Raises:
        ValueError: names the first key that is not neutral, its value, the reason and the remedy.
    """
    for key, neutral in SEQUENCE_SWITCHES.items():
        if config[key] != neutral:
            raise ValueError(f"{key}: {config[key]} needs train_mode: sequence; {reason}. Remove {key}")


class SequenceLoader(WindowLoader):
    """Batches of windows as RecBole interactions (see ``sequence_loss``).

    ``pairs_per_batch`` is RecBole's ``train_batch_size``, in (prefix, next item) pairs as in RecBole, so an epoch has about
    as many optimiser steps as RecBole's own.
    """

    def __init__(self, data: Windows, model: Any, pairs_per_batch: int, seed: int, *, shuffle: bool = True):
        self.data, self.model = data, model
        pairs_per_window = (data.targets != 0).sum().item() / len(data.items)
        super().__init__(len(data.items), pairs_per_batch / pairs_per_window, seed, shuffle=shuffle)

    def _batch(self, rows: Tensor, generator: torch.Generator) -> Interaction:
        from recbole.data.interaction import Interaction

        items, lengths, targets = (part[rows] for part in self.data)
        longest = int(lengths.max())
        items, targets = items[:, :longest], targets[:, :longest]
        batch = {self.model.ITEM_SEQ: items, self.model.ITEM_SEQ_LEN: lengths, self.model.POS_ITEM_ID: targets}
        if self.model.loss_type == "BPR":  # uniform over all items but the target, as in RecBole's RepeatableSampler
            negatives = torch.randint(1, self.model.n_items - 1, targets.shape, generator=generator)
            batch[self.model.NEG_ITEM_ID] = negatives + (negatives >= targets)
        return Interaction(batch)


class SequenceTraining(SteadyTraining):
    """Mixin before RecBole's ``Trainer``, ``class T(SequenceTraining, Trainer)``: epochs run over windows."""

    def __init__(self, config: Any, model: Any):
        make_causal(model)
        sampling = config["train_neg_sample_args"] or {}
        drawn = (sampling.get("distribution"), sampling.get("sample_num"), bool(sampling.get("dynamic")))
        refused = {
            "transform": config["transform"] is not None,
            "single_spec": not config["single_spec"],
            "train_neg_sample_args": model.loss_type == "BPR" and drawn != ("uniform", 1, False),
        }
        for key in filter(refused.get, refused):
            raise ValueError(f"train_mode: sequence does not support {key}: {config[key]!r}. Use train_mode: prefix.")
        SequenceLoss.of(config).check(model)
        super().__init__(config, model)

    def targets_of(self, interaction: Any) -> Tensor:
        return (interaction[self.model.POS_ITEM_ID] != 0).sum(1)

    @classmethod
    def batches(cls, config: Any, model: Any, train_data: Any) -> tuple[SequenceLoader, Callable]:
        """The batches of an epoch, and the loss of each."""
        data = windows(training_histories(train_data.dataset), config["MAX_ITEM_LIST_LENGTH"])
        loss = partial(sequence_loss, model, loss=SequenceLoss.of(config))
        return SequenceLoader(data, model, config["train_batch_size"], config["seed"], shuffle=config["shuffle"]), loss
