"""The training of stage 1 of A-LLMRec (arXiv 2404.11343, section 3.1); what it trains is in ``model/allmrec/alignment.py``.

Legend: B users, I items, H width of the collaborative model, T of the text encoder, Z of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from logging import getLogger
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains, negatives
from recbole_llm.data.domains import Domain
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import TextEncoder, encoding_seconds, load_text_encoder
from recbole_llm.model.allmrec.alignment import Alignment, LossWeights, mismatch, spread
from recbole_llm.settings import Settings
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import save_tensors
from recbole_llm.store.processes import current
from recbole_llm.store.stages import Folders, Stage, Work
from recbole_llm.store.trials import trial, worth_a_trial
from recbole_llm.training.loop import Epochs, LoopOptions, Part, TrainingLoop, weighted

logger = getLogger()

Batch = tuple[list[int], list[list[int]], list[int], list[int]]
"""Users, their histories, next items, and sampled items."""
COMPARED = 2000  # items
ALIKE, UNMATCHED = 0.05, 0.25  # of sigmoids that begin at .01 to .03; chance is .5
TEXT = 5e-3  # guessed seconds of reading and training a text
_TUNED, _WEIGHTS = "text_encoder", "alignment.safetensors"


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
        """The settings of a configuration for a dataset with this many ``interactions``."""
        return super().of(config, weights=LossWeights.of(config, interactions=interactions), **given)


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

    def text_codes(self, texts: Sequence[str], results: Folders) -> Tensor:
        """The codes [N, Z] of any texts, by the result of the stage."""
        folder = results.folder(self.stage())
        tuned = folder / _TUNED
        encoder = load_text_encoder(tuned, device=self.cf.device) if tuned.is_dir() else self.text.load(results)
        weights = load_file(folder / _WEIGHTS)
        alignment = Alignment(weights["item_encoder.weight"].size(1), encoder.dim, self.config.joint_size)
        alignment.load_state_dict(weights)
        return alignment.text_codes(encoder.encode(texts, show_progress=False).cpu()).detach()

    def _cost(self) -> Cost:
        pairs, tuned = _Pairs(self.domain, self.config), self.config.tune_text_encoder
        trains = "the text encoder and two autoencoders" if tuned else "two autoencoders"
        texts = 2 * self.config.batch_size * len(pairs) * tuned + len(self.text.sentences)
        if self.text.stages or not worth_a_trial(TEXT * texts):  # the builtin encoder, which is a table, may not be there yet
            return Cost(samples=pairs.samples, steps=len(pairs), note=f"trains {trains} without the LM, not estimated")
        encoder = self.text.load()
        seconds = encoding_seconds(encoder, self.text.sentences[1:])
        fixed = None if tuned else torch.rand(len(self.text.sentences), encoder.dim, device=self.cf.device)
        training = _Training(self.config, self.cf, encoder, self.text.sentences, fixed)
        following = cycle(range(len(pairs)))

        def step() -> None:
            for part in training.loss(pairs[next(following)]):
                part().backward()

        seconds += trial(step, len(pairs))
        parameters = sum(parameter.numel() for parameter in training.parameters.values())
        note = f"trains {trains} without the LM, whose memory is not estimated"
        return Cost(samples=pairs.samples, steps=len(pairs), parameters=parameters, seconds=seconds, note=note)

    def _build(self, work: Work) -> None:
        config, cf = self.config, self.cf
        cf.load(work.folder(cf.stage))
        encoder, sentences = self.text.load(work), self.text.sentences
        fixed = None if config.tune_text_encoder else self.text.vectors(encoder).to(cf.device)  # [I, T]
        training, pairs = _Training(config, cf, encoder, sentences, fixed), _Pairs(self.domain, config)
        parameters, alignment = training.parameters, training.alignment
        logger.info(f"alignment: {len(pairs)} steps, {sum(p.numel() for p in parameters.values()):,} trainable parameters")
        TrainingLoop(
            name="alignment",
            parameters=parameters,
            optimizer=torch.optim.Adam(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98)),
            loss=lambda step: training.loss(pairs[step]),
            total_steps=len(pairs),
            clip_grad_norm=config.max_grad_norm,
            folder=work.scratch / "loop",
            options=self.options,
            learning_rate_key="stage1_learning_rate",
        ).run()
        encoder.model.requires_grad_(False).eval()
        if fixed is None:
            encoder.save(work.out / _TUNED)
            fixed = encoder.encode(sentences, show_progress=self.options.show_progress).to(cf.device)  # [I, T]
        with torch.no_grad():
            codes = {"joint": alignment.item_codes(cf.item_table), "text": alignment.text_codes(fixed)}  # [I, Z] each
        self._report(codes["joint"], codes["text"])
        save_tensors(work.out / "codes.safetensors", codes)
        save_tensors(work.out / _WEIGHTS, alignment.state_dict())

    def _report(self, joint: Tensor, text: Tensor) -> None:
        """Log how far items differ and match their texts, which the loss does not tell."""
        trained = self.domain.trained_items
        some = torch.from_numpy(trained[:: -(-len(trained) // COMPARED)]).to(joint.device)
        varied, matched = spread(joint[some]), 0.0
        found = f"vectors of items differ by {varied:.0%} of their size"
        if self.config.weights.matching and len(some) > 1:
            matched = mismatch(joint[some], text[some])
            found += f"; for half of them, {matched:.0%} or more of the others are nearer to the text vector (chance: 50 %)"
        if varied < ALIKE or matched > UNMATCHED:
            keys = "raise stage1_epochs or stage1_learning_rate, or give all_positions: True"
            logger.warning(f"alignment: hardly trained, so soft tokens will hardly tell items apart: {found}; {keys}")
        else:
            logger.info(f"alignment: {found}")


class _Training:
    """What stage 1 trains, and its loss.

    Args:
        fixed: the items' text vectors [I, T]; None trains the text encoder, too.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        cf: CollaborativeModel,
        encoder: TextEncoder,
        sentences: Sequence[str],
        fixed: Tensor | None,
    ):
        self._config, self._cf, self._encoder, self._sentences, self._fixed = config, cf, encoder, sentences, fixed
        self._items = cf.item_table  # [I, H]
        self.alignment = Alignment(self._items.shape[1], encoder.dim, config.joint_size).to(cf.device)
        self.parameters = {f"alignment.{name}": p for name, p in self.alignment.named_parameters()}
        if fixed is None:
            encoder.model.requires_grad_(True).train()
            self.parameters |= {f"text_encoder.{name}": p for name, p in encoder.model.named_parameters()}

    def loss(self, batch: Batch) -> list[Part]:
        """The loss of a batch of :class:`_Pairs`, a mean over its users, some of whom each process of the run has."""
        size = len(batch[0])
        number = min(current().size, size)
        shares: list[Any] = [tuple(column[first::number] for column in batch) for first in range(number)]
        return [weighted(len(share[0]) / size, self._loss, *share) for share in shares]

    def _loss(self, users: list[int], histories: list[list[int]], targets: list[int], sampled: list[int]) -> Tensor:
        described = self._texts([*targets, *sampled]).split(len(targets))  # 2 x [B, T]
        states, items = self._cf.user_states(users, histories), self._items  # [B, H], [I, H]
        texts = described[0], described[1]
        return self.alignment.loss(states, (items[targets], items[sampled]), texts, self._config.weights)

    def _texts(self, batch: Sequence[int]) -> Tensor:
        if self._fixed is not None:
            return self._fixed[list(batch)]  # [B, T]
        return self._encoder([self._sentences[item] for item in batch])


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

    def __getitem__(self, step: int) -> Batch:
        rows = [self._rows[i] for i in self._epochs[step]]
        rng = np.random.default_rng([self._seed, step])
        known = [self._domain.histories[row.user] for row in rows]
        histories = [history[: row.end].tolist() for history, row in zip(known, rows, strict=True)]
        targets = [int(history[row.end]) for history, row in zip(known, rows, strict=True)]
        pool = self._domain.trained_items
        excluded = [self._domain.excluded(history, target) for history, target in zip(known, targets, strict=True)]
        sampled = [negatives.one(rng, pool, taken) for taken in excluded]
        return [row.user + 1 for row in rows], histories, targets, sampled
