"""Stage 2 of A-LLMRec (arXiv 2404.11343, section 3.2): projectors of users and items to soft tokens, trained with the LM's loss.

Legend: I items, S soft tokens, H width of the collaborative model, Z of the joint space, D of the LM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_llm.costs.parts import Training, blank, fitting_tokens, shape_of, training_of
from recbole_llm.costs.soft_tokens import BlankSoftTokens
from recbole_llm.data import domains
from recbole_llm.data.domains import TrainingExample
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.data.prompts import Example, Prompt, number_soft_tokens
from recbole_llm.data.templates import PromptSettings
from recbole_llm.llm.forward import lm_loss, loss_scale
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.micro_batches import Encode, MicroBatches, bounded_memory
from recbole_llm.model.allmrec.alignment import Projector, spread
from recbole_llm.model.allmrec.alignment_training import ALIKE, COMPARED
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.settings import Settings
from recbole_llm.store.files import save_tensors
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Folders, Stage, Work
from recbole_llm.training.loop import Part, TrainingLoop, validations, weighted

if TYPE_CHECKING:
    from recbole_llm.classical.collaborative import CollaborativeModel
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.store.costs import Cost

logger = getLogger()


@dataclass(frozen=True)
class ProjectionConfig(Settings):
    """Training settings of stage 2.

    Attributes:
        item_vectors: ``joint``, or as ablations ``text`` and ``random``.
        cold_threshold: an item with fewer training interactions has its text vector.
        all_positions: train on every item of a history, not only on the last one.
    """

    KEYS = {"samples": "train_samples"} | {name: f"stage2_{name}" for name in ("epochs", "batch_size", "learning_rate")}

    epochs: int
    batch_size: int
    learning_rate: float
    max_grad_norm: float | None
    item_vectors: str
    cold_threshold: int
    all_positions: bool
    samples: int | None

    def __post_init__(self) -> None:
        if self.item_vectors not in ("joint", "text", "random"):
            raise ValueError(f"item_vectors: {self.item_vectors!r} is unknown; choose joint, text or random")


@dataclass(frozen=True)
class ProjectionTraining:
    """Stage 2 on the training split of the target.

    Attributes:
        plain_prompts: the prompts without soft tokens.
        alignment: stage 1.
        joint_size: width of its codes.
    """

    config: ProjectionConfig
    parts: RankerParts
    plain_prompts: PromptSettings
    cf: CollaborativeModel
    alignment: Stage
    joint_size: int

    def stage(self, valid: EvalUsers | None) -> Stage:
        """The stage, which writes the projectors that best rank the candidates of ``valid``; None: the last ones."""
        parts = self.parts
        depends = {
            "backbone": parts.backbone.fingerprint,
            "domain": parts.domain.fingerprint,
            "prompts": parts.prompts.as_dict(),
            "training": [self.config.as_dict(), parts.seed],
            "examples": parts.examples.as_dict() if parts.prompts.shows_candidates else None,
            "valid": valid and [valid.fingerprint, parts.scoring.normalize],
        }
        inputs = self.alignment, *parts.backbone.stages
        return Stage("projection", depends, lambda work: self._train(valid, work), inputs, cost=lambda: self._cost(valid))

    def soft_tokens(self, results: Folders, causal: CausalLM) -> SoftTokens:
        """Untrained projectors on the codes of the alignment stage."""
        with preserved_random_state():
            self.cf.load(results.folder(self.cf.stage))
            codes = load_file(results.folder(self.alignment) / "codes.safetensors")  # [I, Z] each
        joint, text = (codes[kind].to(self.cf.device) for kind in ("joint", "text"))
        if self.config.item_vectors == "random":  # without information, with the width of the joint space
            joint = torch.rand(joint.shape, generator=torch.Generator().manual_seed(self.parts.seed)).to(self.cf.device)
        elif self.config.item_vectors == "joint":
            cold = torch.from_numpy(self.parts.histories.train_counts < self.config.cold_threshold)  # [I]
            joint = torch.where(cold.to(joint.device)[:, None], text, joint)
        else:
            joint = text
        return SoftTokens(self.cf, joint, text, width=causal.model.get_input_embeddings().weight.shape[1])

    def _train(self, valid: EvalUsers | None, work: Work) -> None:
        """Train the projectors with the LM's loss on the target's title (eq. 8)."""
        parts, config, causal = self.parts, self.config, self.parts.backbone.load(work)
        soft = self.soft_tokens(work, causal)
        examples, encode = self._examples(causal.tokenizer, soft.user_key)
        histories = parts.domain.histories
        users = [(example.user + 1, histories[example.user][: example.end].tolist()) for example in examples]
        likelihood = self.likelihood(causal, soft)
        parameters = dict(soft.named_parameters())
        with bounded_memory(causal.model, parts.options, work.scratch) as tokens:
            batches = MicroBatches(examples, encode, config.batch_size, tokens, parts.seed)
            total, eval_every = self._schedule(batches)

            def loss(step: int) -> Iterator[Part]:
                for batch, share in batches[step]:
                    yield weighted(share, self._loss, causal, batch, soft, users)

            TrainingLoop(
                name="projection",
                parameters=parameters,
                optimizer=torch.optim.Adam(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98)),
                loss=loss,
                total_steps=total,
                clip_grad_norm=config.max_grad_norm,
                validate=None if valid is None else partial(valid.score, likelihood),
                eval_every=eval_every,
                folder=work.scratch / "loop",
                options=parts.options,
                learning_rate_key="stage2_learning_rate",
                loss_scale=loss_scale(causal.model),
            ).run()
        if parts.prompts.item_tokens:
            self._report(soft)
        save_tensors(work.out / "projectors.safetensors", parameters)

    def _report(self, soft: SoftTokens) -> None:
        """Log how far the soft tokens of items differ, which the loss does not tell."""
        trained = self.parts.domain.trained_items
        with torch.no_grad():
            varied = spread(soft.of_items(trained[:: -(-len(trained) // COMPARED)].tolist()))
        found = f"soft tokens of items differ by {varied:.1%} of their size"
        if varied < ALIKE:
            logger.warning(
                f"projection: the LM hardly tells items apart: {found}; a lower stage2_learning_rate keeps "
                "them apart, which need not rank better"
            )
        else:
            logger.info(f"projection: {found}")

    def _examples(self, tokenizer: Any, user_key: Callable[[int], int]) -> tuple[list[TrainingExample], Encode]:
        """The training examples and their encoding; ``user_key`` maps a row of them to the key of its user's soft token."""
        parts, config, domain = self.parts, self.config, self.parts.domain
        examples = domains.training_examples(
            [domain], positions="all" if config.all_positions else "last", samples=config.samples, seed=parts.seed
        )
        number = {example: user_key(row) for row, example in enumerate(examples)}
        encoder = ExampleEncoder(domain, parts.builder(tokenizer), parts.examples)

        def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
            history = domain.histories[example.user]
            return encoder(history[: example.end + 1].tolist(), rng, number[example], known=history)

        return examples, encode

    def _schedule(self, batches: MicroBatches) -> tuple[int, int]:
        """The number of steps, and that between two validations."""
        total = batches.steps_per_epoch * self.config.epochs
        return total, max(1, -(-total // max(4, self.config.epochs)))

    def _loss(
        self,
        causal: CausalLM,
        batch: list[Example],
        soft: SoftTokens | BlankSoftTokens,
        users: Sequence[tuple[int, Sequence[int]]],
    ) -> Tensor:
        rows, vectors = soft.fill([example.row for example in batch], users)
        batch = [example._replace(row=row) for example, row in zip(batch, rows, strict=True)]
        return lm_loss(causal.model, batch, soft=vectors)

    def blank_soft(self, causal: CausalLM) -> BlankSoftTokens:
        """Soft tokens without values, for costs."""
        return BlankSoftTokens(len(self.parts.domain.items.names), causal.model.get_input_embeddings().weight.shape[1])

    def _cost(self, valid: EvalUsers | None) -> Cost:
        parts, config, outline = self.parts, self.config, self.parts.backbone.outline
        causal, shape = blank(outline), shape_of(outline)
        soft, through = self.blank_soft(causal), training_of(outline, shape, parts.options)
        examples, encode = self._examples(causal.tokenizer, soft.user_key)
        tokens = fitting_tokens(outline, shape, parts.options, through)
        batches = MicroBatches(examples, encode, config.batch_size, tokens, parts.seed)
        total, eval_every = self._schedule(batches)

        def loss(step: int) -> int:
            found = batches[step]
            for batch, _ in found:
                self._loss(causal, batch, soft, ())
            return sum(len(example.row) - 1 for batch, _ in found for example in batch)

        user_size = self.cf.user_states([0], [[]]).shape[1]
        with torch.device("meta"):
            user = Projector(user_size, soft.width, nn.LeakyReLU())
            item = Projector(self.joint_size, soft.width, nn.GELU())
        likelihood = self.likelihood(causal, soft)
        training = Training(
            samples=len(examples),
            steps=total,
            loss=loss,
            parameters=sum(parameter.numel() for module in (user, item) for parameter in module.parameters()),
            validations=0 if valid is None else validations(total, eval_every),
            validate=None if valid is None else partial(valid.score, likelihood),
        )
        return training.cost(shape, through, adapter=0)

    def likelihood(self, causal: CausalLM, soft: SoftTokens | BlankSoftTokens) -> TitleLikelihood:
        """Likelihoods with soft tokens; the prior has none, since without a history there is no user token to project."""
        found = self.parts.likelihood(causal, soft_tokens=soft, user_key=soft.user_key)
        return found if found.prior is None else replace(found, prior=self.without_soft_tokens(causal))

    def without_soft_tokens(self, causal: CausalLM) -> TitleLikelihood:
        """Likelihoods of the LM with the same prompts, but no soft tokens."""
        return self.parts.likelihood(causal, self.parts.builder(causal.tokenizer, prompts=self.plain_prompts))


class SoftTokens(nn.Module):
    """Computes the soft tokens of prompts: ``F_I`` of an item's code, ``F_U`` of a user's state.

    Args:
        cf: the loaded collaborative model.
        codes: the vectors [I, Z] of the items.
        text_codes: the codes [I, Z] of their texts.
        width: D.
    """

    def __init__(self, cf: Any, codes: Tensor, text_codes: Tensor, width: int):
        super().__init__()
        self._cf, self._codes, self._text_codes = cf, codes, text_codes
        self.project_user = Projector(cf.user_states([0], [[]]).shape[1], width, nn.LeakyReLU()).to(cf.device)
        self.project_item = Projector(codes.shape[1], width, nn.GELU()).to(cf.device)

    def user_key(self, row: int) -> int:
        """The key of the user token of a row; keys of users follow those of items."""
        return len(self._codes) + row

    def forward(
        self, prompts: Sequence[Prompt], histories: Sequence[Sequence[int]], users: Sequence[int]
    ) -> tuple[list[Prompt], Tensor | None]:
        """Prompts with numbered soft slots, and the vectors [S, D] of these slots."""
        return self.fill(prompts, list(zip(users, histories, strict=True)))

    def fill(self, prompts: Sequence[Prompt], users: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[Prompt], Tensor | None]:
        """As :meth:`forward`, with (user, history) by the row of :meth:`user_key`. Each soft token is computed once."""
        numbered, keys = number_soft_tokens(prompts)
        items = [key for key in keys if key < len(self._codes)]  # the other keys are those of users
        tokens = [self.of_items(items)] if items else []
        if keys[len(items) :]:
            ids, histories = zip(*(users[key - len(self._codes)] for key in keys[len(items) :]), strict=True)
            tokens.append(self.project_user(self._cf.user_states(ids, histories)))
        return numbered, torch.cat(tokens) if tokens else None

    def of_items(self, items: Sequence[int]) -> Tensor:
        """The soft tokens [N, D] of N items."""
        return self.project_item(self._codes[list(items)])

    def with_new_items(self, codes: Tensor) -> SoftTokens:
        """The same projectors with the text codes [N, Z] of more items after those of the catalogue."""
        other = copy.copy(self)
        other._codes, other._text_codes = (torch.cat([own, codes.to(own)]) for own in (self._codes, self._text_codes))
        return other

    def with_text_vectors(self) -> SoftTokens:
        """The same projectors with text codes for all items."""
        other = copy.copy(self)
        other._codes = self._text_codes
        return other
