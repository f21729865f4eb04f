"""``sequence_loss``: losses of next items over the catalogue, in place of the one in RecBole's model.

Legend: T targets of a batch, H width, I items with the padding item 0, K sampled negatives. The score of an item is its product
with the state, plus its bias where the model has biases (BERT4Rec).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from recbole_llm.settings import Settings

ROWS = 256
"""Targets whose scores of the whole catalogue are in memory at a time."""


@dataclass(frozen=True)
class SequenceLoss(Settings):
    """The loss that ``sequence_loss`` names; called with the states, weights, biases and targets of a batch.

    Attributes:
        name: ``recbole``: that of the model; it is not computed here.
        negatives: number K of sampled negatives, the same for all targets of a batch.
        gbce_t: calibration of gBCE, in [0, 1].
    """

    KEYS: ClassVar[Mapping[str, str]] = {"name": "sequence_loss", "negatives": "sequence_negatives"}

    name: str = "recbole"
    negatives: int = 256
    gbce_t: float = 0.75

    @classmethod
    def of(cls, config: Any, **given: Any) -> Self:
        """Of a run; a plain ``Config`` of RecBole, which has no such keys, gives RecBole's loss."""
        return super().of(config, **given) if config["sequence_loss"] else cls()

    @property
    def is_recboles(self) -> bool:
        """Whether the loss is the model's own."""
        return self.name == "recbole"

    def check(self, model: Any) -> None:
        """Refuse a model that has a loss of another kind, and more negatives than items.

        Raises:
            ValueError: names the key and the remedy.
        """
        if self.is_recboles:
            return
        model_name = type(model).__name__
        if model_name == "NextItNet":
            raise ValueError(
                f"sequence_loss: {self.name} would drop the regulariser in NextItNet's own loss; give --sequence_loss=recbole"
            )
        if model.loss_type != "CE":
            raise ValueError(
                f"sequence_loss: {self.name} takes the place of the model's softmax, but loss_type is {model.loss_type}; "
                "give --loss_type=CE, or --sequence_loss=recbole"
            )
        if self.name != "softmax" and self.negatives >= model.n_items - 1:
            raise ValueError(
                f"sequence_negatives: {self.negatives} is too large for a catalogue of {model.n_items - 1} items; "
                "give --sequence_loss=softmax, which takes all of them"
            )

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """The mean loss, a scalar.

        Args:
            states: ``[T, H]``.
            weight: of the items, ``[I, H]``.
            bias: of the items, ``[I]``, if the model has any.
            targets: item ids, ``[T]``.
        """
        if self.name == "softmax":
            return softmax_loss(states, weight, bias, targets)
        items = 1 + torch.randperm(len(weight) - 1, device=states.device)[: self.negatives]  # [K], each item at most once
        # one lookup, since the gradient of each is as large as the catalogue
        of_targets, of_items = embedding(torch.cat((targets, items)), weight).split((len(targets), len(items)))
        positive = (states * of_targets).sum(1)  # [T]
        negative = states @ of_items.T  # [T, K]
        if bias is not None:
            positive, negative = positive + bias[targets], negative + bias[items]
        hits = targets[:, None] == items  # [T, K]; a target is no negative of its own
        if self.name == "sampled_softmax":
            return sampled_softmax_loss(positive, negative, hits, len(weight) - 1)
        return gbce_loss(positive, negative, hits, len(weight) - 1, self.gbce_t)


def softmax_loss(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int = ROWS) -> Tensor:
    """Mean cross-entropy over all items, as RecBole's (item 0 included); ``rows`` targets are computed at a time.

    The whole score matrix ``[T, I]`` is never in memory: the gradient is computed in the same pass as the loss.
    """
    return _ChunkedSoftmax.apply(states.to(weight.dtype), weight, bias, targets, rows)  # type: ignore[no-any-return]


class _ChunkedSoftmax(torch.autograd.Function):
    """Cross-entropy with the gradient ``softmax - one_hot`` of its scores, in chunks of rows."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        total = states.new_zeros(())
        d_states, d_weight = torch.empty_like(states), torch.zeros_like(weight)  # [T, H], [I, H]
        d_bias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(states.device.type, enabled=False):
            parts = zip(states.split(rows), targets[:, None].split(rows), d_states.split(rows), strict=True)
            for part, target, d_part in parts:
                scores = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)  # [rows, I]
                shares = scores.softmax(1)
                # of the largest score, since the share of the target may be 0 in float32
                log_sum = scores.amax(1) - shares.amax(1).log()  # [rows]
                total += (log_sum - scores.gather(1, target)[:, 0]).sum()
                shares.scatter_add_(1, target, shares.new_full(target.shape, -1.0))
                torch.mm(shares, weight, out=d_part)
                d_weight.addmm_(shares.T, part)
                if d_bias is not None:
                    d_bias += shares.sum(0)
        ctx.save_for_backward(d_states, d_weight, d_bias)
        ctx.count = len(states)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0] / ctx.count
        return *(None if part is None else part * scale for part in ctx.saved_tensors), None, None


def sampled_softmax_loss(positive: Tensor, negative: Tensor, hits: Tensor, catalogue: int) -> Tensor:
    """Softmax over the target and sampled items that stand for all others (Jean et al., ACL 2015, section 3).

    The negatives are drawn uniformly and without repeats from the whole catalogue, so a negative counts as often as there are
    other items per negative: the sum of the exponentials is unbiased, and with all items it is the softmax.

    Args:
        positive: scores of the targets, ``[T]``.
        negative: scores of the negatives, ``[T, K]``.
        hits: where a negative is the target, ``[T, K]``; it is left out.
        catalogue: number of items.
    """
    weight = math.log(catalogue - 1) - (~hits).sum(1).log()  # [T]
    others = negative.masked_fill(hits, -torch.inf).logsumexp(1) + weight
    return (torch.logaddexp(positive, others) - positive).mean()


def gbce_loss(positive: Tensor, negative: Tensor, hits: Tensor, catalogue: int, t: float) -> Tensor:
    """gBCE (Petrov & Macdonald, RecSys 2023, section 5): binary cross-entropy, the target's probability to the power beta.

    ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)`` with the sampling rate ``alpha = K / (catalogue - 1)``. With t = 0 it is
    the binary cross-entropy; with t = 1 the probabilities are calibrated. The negatives are shared by the targets of a batch,
    other than in the paper. Arguments as of :func:`sampled_softmax_loss`.
    """
    negatives = negative.shape[1]
    parts = gbce_beta(negatives, catalogue, t) * logsigmoid(positive) + logsigmoid(-negative).masked_fill(hits, 0).sum(1)
    return -parts.mean() / (negatives + 1)


def gbce_beta(negatives: int, catalogue: int, t: float) -> float:
    """The power beta of gBCE."""
    alpha = negatives / (catalogue - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)
