"""Stage 1 of A-LLMRec (arXiv 2404.11343, section 3.1): two autoencoders with similar codes for the same item.

::

    E_i [H]  collaborative vector --item encoder--> e_i [Z] --item decoder--> E'_i [H]      x_u . E'_i: recommendation
                                                     |  matching
    Q_i [T]  text vector -----------text encoder--> q_i [Z] --text decoder--> Q'_i [T]

The joint vector ``e_i`` then represents an item, or ``q_i`` if it has no interactions.

Legend: B users, H width of the collaborative model, T of the text encoder, Z of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.settings import Settings

LARGE = 440_000  # interactions: the paper's beta is .5 on Games (598,509) and Movies, .2 on Beauty and Toys (282,213)


@dataclass(frozen=True)
class LossWeights(Settings):
    """Weights of the terms of the loss of stage 1 (eq. 6).

    Attributes:
        recommendation, matching: 1 in the paper.
        item_reconstruction, text_reconstruction: the paper's alpha and beta.
        match_negatives: also match the codes of sampled items, as the published code does.
        logits: ``sum`` of the products of user state and item vector (the paper's dot product), or their ``mean`` (its code).
    """

    KEYS = {
        "recommendation": "recommendation_weight",
        "matching": "matching_weight",
        "item_reconstruction": "alpha",
        "text_reconstruction": "beta",
    }

    recommendation: float = 1.0
    matching: float = 1.0
    item_reconstruction: float = 0.5
    text_reconstruction: float = 0.2
    match_negatives: bool = False
    logits: str = "sum"

    def __post_init__(self) -> None:
        if self.logits not in ("sum", "mean"):
            raise ValueError(f"logits: {self.logits!r} is neither sum (the paper) nor mean (its code)")

    @classmethod
    def of(cls, config: Any, *, interactions: int = 0, **given: Any) -> LossWeights:
        """The settings of a configuration; the default beta is the paper's for a dataset of this many ``interactions``."""
        if config["beta"] is None:
            given["text_reconstruction"] = 0.5 if interactions >= LARGE else 0.2
        return super().of(config, **given)


class Codes(NamedTuple):
    """Codes of items and their reconstructions: [B, Z], [B, H], [B, Z], [B, T]."""

    item: Tensor
    item_decoded: Tensor
    text: Tensor
    text_decoded: Tensor


class Alignment(nn.Module):
    """The item and the text autoencoder; encoders are a linear layer and a sigmoid, decoders a linear layer."""

    def __init__(self, item_size: int, text_size: int, joint_size: int):
        super().__init__()
        self.item_encoder, self.item_decoder = nn.Linear(item_size, joint_size), nn.Linear(joint_size, item_size)
        self.text_encoder, self.text_decoder = nn.Linear(text_size, joint_size), nn.Linear(joint_size, text_size)

    def item_codes(self, vectors: Tensor) -> Tensor:
        """``e_i`` [B, Z] of collaborative vectors [B, H]."""
        return torch.sigmoid(self.item_encoder(vectors))

    def text_codes(self, vectors: Tensor) -> Tensor:
        """``q_i`` [B, Z] of text vectors [B, T]."""
        return torch.sigmoid(self.text_encoder(vectors))

    def forward(self, items: Tensor, texts: Tensor) -> Codes:
        item, text = self.item_codes(items), self.text_codes(texts)  # [B, Z], [B, Z]
        return Codes(item, self.item_decoder(item), text, self.text_decoder(text))

    def loss(self, states: Tensor, items: tuple[Tensor, Tensor], texts: tuple[Tensor, Tensor], weights: LossWeights) -> Tensor:
        """The loss (eq. 6) for users with one target and one sampled item each: a scalar.

        Args:
            states: user states before the target [B, H].
            items: collaborative vectors of the targets and of the sampled items, [B, H] each.
            texts: their text vectors, [B, T] each.
        """
        target, sampled = self(items[0], texts[0]), self(items[1], texts[1])
        matched = (target, sampled) if weights.match_negatives else (target,)
        reconstructed = list(zip((target, sampled), items, texts, strict=True))
        return (
            weights.recommendation * _recommendation(states, target, sampled, weights.logits)  # eq. 5
            + weights.matching * sum(F.mse_loss(codes.item, codes.text) for codes in matched)  # eq. 2
            + weights.item_reconstruction * sum(F.mse_loss(codes.item_decoded, item) for codes, item, _ in reconstructed)  # eq. 3
            + weights.text_reconstruction
            * sum(F.mse_loss(codes.text_decoded, text.detach()) for codes, _, text in reconstructed)  # eq. 4
        )


def _recommendation(states: Tensor, target: Codes, sampled: Codes, logits: str) -> Tensor:
    """Binary cross-entropy of the next item and a sampled one, from decoded item vectors: a scalar."""
    products = [states * codes.item_decoded for codes in (target, sampled)]  # [B, H] each
    positive, negative = (some.sum(-1) if logits == "sum" else some.mean(-1) for some in products)  # [B] each
    cross_entropy = F.binary_cross_entropy_with_logits
    return cross_entropy(positive, torch.ones_like(positive)) + cross_entropy(negative, torch.zeros_like(negative))


def spread(codes: Tensor) -> float:
    """How much codes [I, Z] differ between items, as a share of their size: 0 if all are equal."""
    return float(codes.std(0, correction=0).square().mean().sqrt() / codes.square().mean().sqrt())


@torch.no_grad()
def mismatch(joint: Tensor, text: Tensor) -> float:
    """How far the codes of the same items are apart: 0 if each text code is nearest to its own item's, about .5 by chance.

    Args:
        joint, text: ``e_i`` and ``q_i`` [I, Z] of at least two items.

    Returns:
        The median over items of the share of other items whose ``e_j`` is nearer to ``q_i`` than ``e_i`` is.
    """
    exact = "donot_use_mm_for_euclid_dist"  # codes that are hardly trained differ in the last digits
    distances = torch.cdist(text, joint, compute_mode=exact)  # [I, I]
    nearer = (distances < distances.diagonal().unsqueeze(1)).sum(1)  # [I]
    return float(nearer.float().median()) / (len(joint) - 1)


class Projector(nn.Sequential):
    """``F_U`` and ``F_I`` of stage 2: user states or item codes [B, N] -> the LM's input space [B, D]."""

    def __init__(self, size: int, width: int, activation: nn.Module):
        first, last = nn.Linear(size, width), nn.Linear(width, width)
        super().__init__(first, nn.LayerNorm(width), activation, last)
        for layer in (first, last):
            nn.init.xavier_normal_(layer.weight)
