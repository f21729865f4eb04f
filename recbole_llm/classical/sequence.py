"""``train_mode: sequence``: train RecBole's causal models on whole sequences, one forward pass for many targets.

RecBole cuts a history ``i1 i2 ... in`` into its n - 1 prefixes and runs the model on each, to read one state and
predict one next item. In a causal model the state at position j depends on the first j items alone, so a single pass
over a window of ``MAX_ITEM_LIST_LENGTH`` items yields the states of all its prefixes, and the same (prefix, next item)
pairs cost a fraction of the work. SASRec was trained like this in its paper (Kang & McAuley, ICDM 2018, section III-E).

The model's own ``calculate_loss`` is used. During one call, two methods of the instance are replaced: ``gather_indexes``
returns every position instead of the last, and ``forward`` returns these states. Terms that the model adds to its loss are
included (NextItNet's regulariser). Where windows and prefixes coincide, the loss equals RecBole's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from recbole_llm.data.sequences import last_items

if TYPE_CHECKING:
    from recbole.data.dataset import SequentialDataset
    from recbole.data.interaction import Interaction


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

    This changes NextItNet only. RecBole pads on the right, and its NextItNet reads the last column, padding included, so
    its states depend on the amount of padding. Here it reads the last item, in training and in evaluation.

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
    return model


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


def sequence_loss(model: Any, interaction: Interaction) -> Tensor:
    """The model's own ``calculate_loss`` over all prefixes of a batch of windows, from one forward pass.

    Args:
        model: a RecBole model of ``CAUSAL_MODELS``.
        interaction: as RecBole's training batches, ``item_id_list [B, L]`` and ``item_length [B]``, but with one target
            per position, ``item_id [B, L]``, 0 for none; for BPR ``neg_item_id [B, L]`` too.

    Returns:
        Scalar, the mean over the targets (plus terms that the model adds, such as NextItNet's regulariser).
    """
    prefixes = {model.ITEM_SEQ: interaction[model.ITEM_SEQ], model.ITEM_SEQ_LEN: interaction[model.ITEM_SEQ_LEN]}
    trained = interaction[model.POS_ITEM_ID] != 0  # [B, L]
    states = sequence_states(model, *prefixes.values())[trained]  # [T, H]
    for field in (model.POS_ITEM_ID, model.NEG_ITEM_ID):
        if field in interaction:
            prefixes[field] = interaction[field][trained]  # [T]
    with _replaced(model, forward=lambda *_: states):
        return model.calculate_loss(prefixes)


# -- windows -----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Rows of consecutive items: ``items[n, : j + 1]`` predict ``targets[n, j]``."""

    items: Tensor
    """``[N, L]``, padded on the right with 0."""
    lengths: Tensor
    """``[N]``"""
    targets: Tensor
    """``[N, L]``, 0 if there is no target or it belongs to another window."""


def windows(histories: Sequence[Tensor], max_len: int) -> Windows:
    """Cut histories (item ids in time order, ``[n]`` each) into windows; every next item is a target exactly once.

    A history of n items has n - 1 targets and ``ceil((n - 1) / max_len)`` windows, the fewest possible. The first window
    has the first ``max_len`` targets. The others share the remaining targets evenly and begin early enough to be full,
    which maximises the shortest context of a target.
    """
    rows, targets, lengths = [], [], []
    for history in histories:
        done = 0
        for end in window_ends(len(history) - 1, max_len):
            start = max(end - max_len, 0)
            fresh = history[start + 1 : end + 1].clone()
            fresh[: done - start] = 0
            blank = max_len - (end - start)
            rows.append(pad(history[start:end], (0, blank)))
            targets.append(pad(fresh, (0, blank)))
            lengths.append(end - start)
            done = end
    if not rows:
        raise ValueError("no user has two interactions to train on")
    return Windows(torch.stack(rows), torch.tensor(lengths), torch.stack(targets))


def window_ends(count: int, max_len: int) -> list[int]:
    """Ends of the windows over ``count`` targets: ``max_len``, then evenly spaced up to ``count``."""
    others = -(-count // max_len) - 1
    if others < 1:
        return [count] if count > 0 else []
    return [max_len + (count - max_len) * k // others for k in range(others + 1)]


def training_histories(dataset: SequentialDataset) -> list[Tensor]:
    """Every user's training items in time order, restored from the rows of RecBole's augmented training split.

    Raises:
        ValueError: rows of a user's history are missing (files that were split elsewhere).
    """
    rows = dataset.inter_feat
    order = torch.sort(rows[dataset.uid_field], stable=True).indices  # [R]
    users = rows[dataset.uid_field][order]
    targets = rows[dataset.iid_field][order]
    lengths = rows[dataset.item_list_length_field][order]
    before = last_items(rows[order], dataset.item_id_list_field, lengths)  # [R]
    first = torch.ones_like(users, dtype=torch.bool)
    first[1:] = users[1:] != users[:-1]
    follows = torch.where(first, lengths == 1, before == targets.roll(1))  # [R]
    if not follows.all():
        user = dataset.id2token(dataset.uid_field, users[~follows][0].item())
        raise ValueError(
            f"train_mode: sequence needs the whole training history of each user, but rows of user {user!r} are "
            "missing or out of order (benchmark_filename?). Use train_mode: prefix."
        )
    counts = torch.unique_consecutive(users, return_counts=True)[1].tolist()
    return [torch.cat([start[None], items]) for start, items in zip(before[first], targets.split(counts), strict=True)]


# -- training ----------------------------------------------------------------------------------------------------------


class WindowLoader:
    """Batches of windows in an order drawn from ``(seed, epoch)``; subclasses make them in ``_batch``."""

    _batch: Callable[[Tensor, torch.Generator], Interaction]

    def __init__(self, count: int, windows_per_batch: float, seed: int):
        self._count, self._seed, self.epoch = count, seed, 0
        self.batch_size = max(1, round(windows_per_batch))

    def __len__(self) -> int:
        return -(-self._count // self.batch_size)

    def __iter__(self) -> Iterator[Interaction]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        for rows in torch.randperm(self._count, generator=generator).split(self.batch_size):
            yield self._batch(rows, generator)


class SequenceLoader(WindowLoader):
    """Batches of windows as RecBole interactions (see ``sequence_loss``).

    ``pairs_per_batch`` is RecBole's ``train_batch_size``, in (prefix, next item) pairs as in RecBole, so an epoch has about
    as many optimiser steps as RecBole's own.
    """

    def __init__(self, data: Windows, model: Any, pairs_per_batch: int, seed: int):
        self.data, self.model = data, model
        pairs_per_window = (data.targets != 0).sum().item() / len(data.items)
        super().__init__(len(data.items), pairs_per_batch / pairs_per_window, seed)

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


class SequenceTraining:
    """Mixin before RecBole's ``Trainer``, ``class T(SequenceTraining, Trainer)``: epochs run over windows."""

    _batches: tuple[SequenceLoader, Callable] | None = None

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
        super().__init__(config, model)  # type: ignore[call-arg]

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Callable | None = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        if self._batches is None:
            self._batches = self.batches(self.config, self.model, train_data)  # type: ignore[attr-defined]
        loader, loss = self._batches
        loader.epoch = epoch_idx
        return super()._train_epoch(loader, epoch_idx, loss_func or loss, show_progress)  # type: ignore[misc]

    @classmethod
    def batches(cls, config: Any, model: Any, train_data: Any) -> tuple[SequenceLoader, Callable]:
        """The batches of an epoch, and the loss of each."""
        data = windows(training_histories(train_data.dataset), config["MAX_ITEM_LIST_LENGTH"])
        return SequenceLoader(data, model, config["train_batch_size"], config["seed"]), partial(sequence_loss, model)
