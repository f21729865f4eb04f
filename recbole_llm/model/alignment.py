"""Stage 1 of A-LLMRec (arXiv 2404.11343, section 3.1): two autoencoders with similar codes for the same item.

::

    E_i [H]  collaborative vector --item encoder--> e_i [Z] --item decoder--> E'_i [H]      x_u . E'_i: recommendation
                                                     |  matching
    Q_i [T]  text vector -----------text encoder--> q_i [Z] --text decoder--> Q'_i [T]

The joint vector ``e_i`` then represents an item, or ``q_i`` if it has no interactions.

Legend: B users, H width of the collaborative model, T of the text encoder, Z of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains, negatives
from recbole_llm.data.domains import Domain
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.settings import Settings
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import save_tensors
from recbole_llm.store.stages import Stage, Work
from recbole_llm.training.loop import Epochs, LoopOptions, TrainingLoop

logger = getLogger()

LARGE = 500_000  # interactions: the paper's beta is .5 on Games (598,509) and Movies, .2 on Beauty and Toys (282,213)


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
        """The settings of a configuration; the default beta is the paper's for a dataset with so many ``interactions``."""
        if config["beta"] is None:
            given["text_reconstruction"] = 0.5 if interactions >= LARGE else 0.2
        return super().of(config, **given)


@dataclass(frozen=True)
class AlignmentConfig(Settings):
    """Training settings of stage 1.

    Attributes:
        all_positions: train on every item of a history, not only on the last one, as published.
    """

    KEYS = {name: f"stage1_{name}" for name in ("samples", "epochs", "batch_size", "learning_rate")}

    joint_size: int
    weights: LossWeights
    tune_text_encoder: bool
    all_positions: bool
    samples: int | None
    epochs: int
    batch_size: int
    learning_rate: float
    max_grad_norm: float | None
    seed: int

    @classmethod
    def of(cls, config: Any, *, interactions: int = 0, **given: Any) -> AlignmentConfig:
        """The settings of a configuration for a dataset with so many ``interactions``."""
        return super().of(config, weights=LossWeights.of(config, interactions=interactions), **given)


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


@dataclass(frozen=True)
class AlignmentTraining:
    """Stage 1 on the training split of a domain.

    Attributes:
        text: the text encoder with the sentences of the items.
    """

    config: AlignmentConfig
    domain: Domain
    cf: CollaborativeModel
    text: TextBackbone
    options: LoopOptions

    def stage(self) -> Stage:
        """The stage, which writes the codes of all items, the weights and, if it was fine-tuned, the text encoder."""
        depends = {"config": asdict(self.config), "domain": self.domain.fingerprint, "text": self.text.fingerprint}
        return Stage("alignment", depends, self._build, inputs=(self.cf.stage, *self.text.stages), cost=self._cost)

    def _cost(self) -> Cost:
        pairs = _Pairs(self.domain, self.config)
        trains = "the text encoder and two autoencoders" if self.config.tune_text_encoder else "two autoencoders"
        return Cost(samples=pairs.samples, steps=len(pairs), note=f"trains {trains} without the LM, not estimated")

    def _build(self, work: Work) -> None:
        config, cf = self.config, self.cf
        cf.load(work.folder(cf.stage))
        encoder, sentences = self.text.load(work), self.text.sentences
        items = cf.item_table  # [I, H]
        fixed = None if config.tune_text_encoder else self.text.vectors(encoder).to(cf.device)  # [I, T]
        alignment = Alignment(items.shape[1], encoder.dim, config.joint_size).to(cf.device)
        parameters = {f"alignment.{name}": p for name, p in alignment.named_parameters()}
        if fixed is None:
            encoder.model.requires_grad_(True).train()
            parameters |= {f"text_encoder.{name}": p for name, p in encoder.model.named_parameters()}

        def texts(batch: Sequence[int]) -> Tensor:
            return fixed[list(batch)] if fixed is not None else encoder([sentences[item] for item in batch])  # [B, T]

        pairs = _Pairs(self.domain, config)

        def loss(step: int) -> list[Tensor]:
            users, histories, targets, sampled = pairs[step]
            described = texts([*targets, *sampled]).split(len(targets))  # 2 x [B, T]
            states = cf.user_states(users, histories)  # [B, H]
            return [alignment.loss(states, (items[targets], items[sampled]), (described[0], described[1]), config.weights)]

        logger.info(f"alignment: {len(pairs)} steps, {sum(p.numel() for p in parameters.values()):,} trainable parameters")
        TrainingLoop(
            name="alignment",
            parameters=parameters,
            optimizer=torch.optim.Adam(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98)),
            loss=loss,
            total_steps=len(pairs),
            clip_grad_norm=config.max_grad_norm,
            folder=work.scratch / "loop",
            options=self.options,
            learning_rate_key="stage1_learning_rate",
        ).run()
        encoder.model.requires_grad_(False).eval()
        if fixed is None:
            encoder.save(work.out / "text_encoder")
            fixed = encoder.encode(sentences, show_progress=self.options.show_progress).to(cf.device)  # [I, T]
        with torch.no_grad():
            codes = {"joint": alignment.item_codes(items), "text": alignment.text_codes(fixed)}  # [I, Z] each
        save_tensors(work.out / "codes.safetensors", codes)
        save_tensors(work.out / "alignment.safetensors", alignment.state_dict())


class _Pairs:
    """Batches by step: users, histories, next items, and for each user one sampled item that is not in the history."""

    def __init__(self, domain: Domain, config: AlignmentConfig):
        self._domain, self._seed = domain, config.seed
        self._rows = domains.training_examples(
            [domain], positions="all" if config.all_positions else "last", samples=config.samples, seed=config.seed
        )
        self._epochs = Epochs(len(self._rows), config.batch_size, config.seed)
        self.samples, self._length = len(self._rows), self._epochs.steps * config.epochs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> tuple[list[int], list[list[int]], list[int], list[int]]:
        rows = [self._rows[i] for i in self._epochs[step]]
        rng = np.random.default_rng([self._seed, step])
        known = [self._domain.histories[row.user] for row in rows]
        histories = [history[: row.end].tolist() for history, row in zip(known, rows, strict=True)]
        targets = [int(history[row.end]) for history, row in zip(known, rows, strict=True)]
        pool = self._domain.trained_items
        excluded = [self._domain.excluded(history, target) for history, target in zip(known, targets, strict=True)]
        sampled = [negatives.one(rng, pool, taken) for taken in excluded]
        return [row.user + 1 for row in rows], histories, targets, sampled


class Projector(nn.Sequential):
    """``F_U`` and ``F_I`` of stage 2: user states or item codes [B, N] -> the LM's input space [B, D]."""

    def __init__(self, size: int, width: int, activation: nn.Module):
        first, last = nn.Linear(size, width), nn.Linear(width, width)
        super().__init__(first, nn.LayerNorm(width), activation, last)
        for layer in (first, last):
            nn.init.xavier_normal_(layer.weight)
