"""ALLMRec: a frozen LLM that reads a collaborative model's users and items as soft tokens in its prompt.

Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender System", KDD
2024 (arXiv 2404.11343), "A-LLMRec". Nothing of the LM and of the collaborative model (SASRec) is ever changed. Two stages:

1. alignment (``model/alignment.py``): the item vectors of SASRec and the text vectors of SBERT are brought into one joint
   space, in which an item without interactions is represented by its text alone;
2. projection: two small networks map the user's state and the items' joint vectors to tokens of the LM; they are trained by
   the LM's loss on the title of the next item (eq. 8)::

       [F_U(x_u)] is a user representation. This user has watched "title"[F_I(e_i)], ... Recommend one next movie from
       "title"[F_I(e_j)], ... The recommendation is -> title

Candidates are ranked by the likelihood of their titles instead of by comparing strings with a generated answer.

Legend: B users, C candidates, I items, S soft tokens, H width of the collaborative model, Z of the joint space, D of the LM.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import TrainingExample
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.data.prompts import Example, Prompt, number_soft_tokens, template
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.finetune import Batches
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.scoring import lm_loss
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import item_sentences
from recbole_llm.model.alignment import AlignmentConfig, AlignmentTraining, Projector
from recbole_llm.model.parts import histories_of, text_fields
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.files import preserved_random_state, save_tensors
from recbole_llm.store.stages import Folders, Stage, StageCache, Work
from recbole_llm.training.loop import TrainingLoop

TEXT_ONLY, LLM_ONLY = "text vectors", "LLM only"


@dataclass(frozen=True)
class ProjectionConfig:
    """How stage 2 is trained, and which vectors stand for items.

    Attributes:
        item_vectors: ``joint``, or, as ablations, ``text`` and ``random``.
        cold_threshold: an item with fewer training interactions is represented by its text.
        all_positions: train on every item of a history, not on the last one alone.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    item_vectors: str
    cold_threshold: int
    all_positions: bool
    samples: int | None

    def __post_init__(self) -> None:
        if self.item_vectors not in ("joint", "text", "random"):
            raise ValueError(f"item_vectors: {self.item_vectors!r} is unknown; choose joint, text or random")

    @classmethod
    def of(cls, config: Any) -> ProjectionConfig:
        """The settings of a configuration."""
        keys = ("item_vectors", "cold_threshold", "all_positions")
        stage2 = {key: config[f"stage2_{key}"] for key in ("epochs", "batch_size", "learning_rate")}
        return cls(**stage2, **{key: config[key] for key in keys}, samples=config["train_samples"])


class ALLMRec(LLMRanker):
    """SASRec aligned with SBERT, projected into a frozen LLM's token space."""

    uses_cf_model = True

    def __init__(self, config: Any, dataset: Any):
        if config["scorer"] == "label":
            raise ValueError("scorer: label reads a label, ALLMRec answers with a title; choose tree, prefix or naive")
        super().__init__(config, dataset)
        text = template(config, config["soft_prompt"])
        self.plain_prompts = replace(self.parts.prompts, template=text.replace("{user}", ""))  # without any soft token
        user = config["user_text"] if config["user_representation"] else ""
        soft = replace(self.plain_prompts, template=text.replace("{user}", user), item_tokens=config["joint_embedding"])
        examples = replace(self.parts.examples, whole_histories=False)
        self.parts = replace(self.parts, prompts=soft, examples=examples)
        self.cf = CollaborativeModel.of(config, self.parts.histories, self.max_seq_length)
        # a model without vectors that could be read is refused now, not after a training
        _ = self.cf.item_table, self.cf.user_states([0], [[]])
        if self.reranks:  # in a full ranking, the model's own collaborative model finds what the LM re-ranks
            self.retriever = self.cf
        sentences = item_sentences(self.parts.domain.items, text_fields(config))
        self.alignment = AlignmentTraining(
            AlignmentConfig.of(config, self.parts.domain), self.parts.domain, self.cf, TextBackbone(config, sentences),
            self.parts.options,
        )  # fmt: skip
        self.projection = ProjectionConfig.of(config)
        cold = self.parts.histories.train_counts < self.projection.cold_threshold
        self.is_cold = torch.from_numpy(cold)  # [I]

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        valid, parts = self.parts.eval_users(candidates), self.parts
        if tokenizer := parts.backbone.tokenizer:
            parts.builder(tokenizer)  # what does not fit it is refused before anything is trained
        self.alignment_stage = self.alignment.stage()
        depends = {
            "backbone": parts.backbone.fingerprint,
            "domain": parts.domain.fingerprint,
            "prompts": parts.prompts.as_dict(),
            "training": [asdict(self.projection), parts.seed],
            "examples": parts.examples.as_dict() if parts.prompts.shows_candidates else None,
            "valid": [valid.fingerprint, parts.scoring.normalize],
        }

        def build(work: Work) -> None:
            soft = self._soft_tokens(work, parts.backbone.load(work))
            self._train(soft, valid, work)

        self.projection_stage = Stage("projection", depends, build, (self.alignment_stage, *parts.backbone.stages))
        return [self.projection_stage]

    def _soft_tokens(self, results: Folders, causal: CausalLM) -> SoftTokens:
        """Untrained projectors over the codes of the alignment stage."""
        with preserved_random_state():
            self.cf.load(results.folder(self.cf.stage))
            codes = load_file(results.folder(self.alignment_stage) / "codes.safetensors")  # [I, Z] each
        joint, text = (codes[kind].to(self.cf.device) for kind in ("joint", "text"))
        if self.projection.item_vectors == "random":  # as wide as the joint space, and without any meaning
            joint = torch.rand(joint.shape, generator=torch.Generator().manual_seed(self.parts.seed)).to(self.cf.device)
        elif self.projection.item_vectors == "joint":
            joint = torch.where(self.is_cold.to(joint.device)[:, None], text, joint)
        else:
            joint = text
        width = causal.model.get_input_embeddings().weight.shape[1]
        return SoftTokens(self.cf, joint, text, width)

    def _train(self, soft: SoftTokens, valid: Any, work: Work) -> None:
        """Stage 2: the LM's loss on the target's title trains the projectors (eq. 8)."""
        parts, config, causal = self.parts, self.projection, self.parts.backbone.load(work)
        domain, prompts = parts.domain, parts.builder(causal.tokenizer)
        examples = domains.training_examples(
            [domain], positions="all" if config.all_positions else "last", samples=config.samples, seed=parts.seed
        )
        number = {example: soft.user_key(row) for row, example in enumerate(examples)}
        asking = [(example.user + 1, domain.histories[example.user][: example.end].tolist()) for example in examples]
        encoder = ExampleEncoder(domain, prompts, parts.examples)

        def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
            history = domain.histories[example.user][: example.end + 1].tolist()
            return encoder(history, rng, number[example])

        batches = Batches(examples, encode, config.batch_size, 1, parts.seed)

        def loss(micro: int) -> Tensor:
            batch, share = batches[micro]
            rows, vectors = soft.fill([example.row for example in batch], asking)
            batch = [example._replace(row=row) for example, row in zip(batch, rows, strict=True)]
            return share * lm_loss(causal.model, batch, int(causal.tokenizer.pad_token_id), soft=vectors)

        likelihood = self._likelihood(causal, soft)
        total = batches.steps_per_epoch * config.epochs
        parameters = dict(soft.named_parameters())
        TrainingLoop(
            name="projection",
            parameters=parameters,
            optimizer=torch.optim.Adam(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98)),
            loss=loss,
            total_steps=total,
            validate=lambda: valid.score(likelihood),
            eval_every=max(1, -(-total // max(4, config.epochs))),
            folder=work.scratch / "loop",
            options=parts.options,
            learning_rate_key="stage2_learning_rate",
        ).run()
        save_tensors(work.out / "projectors.safetensors", parameters)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _likelihood(self, causal: CausalLM, soft: SoftTokens) -> TitleLikelihood:
        """With soft tokens; without a history there is no user token to project, so the prior has none."""
        found = self.parts.likelihood(causal, soft_tokens=soft, user_key=soft.user_key)
        return found if found.prior is None else replace(found, prior=self._without_soft_tokens(causal))

    def _without_soft_tokens(self, causal: CausalLM) -> TitleLikelihood:
        """The LM alone, on the same prompts."""
        return self.parts.likelihood(causal, self.parts.builder(causal.tokenizer, prompts=self.plain_prompts))

    def rows(self, causal: CausalLM, cache: StageCache) -> dict[str, Variant]:
        """The model, its collaborative model, itself with text vectors for all items, and the LM alone."""
        folder = cache.folder(self.projection_stage)
        with preserved_random_state():
            self.soft = self._soft_tokens(cache, causal)
        weights = load_file(folder / "projectors.safetensors")
        self.soft.load_state_dict(weights)
        self.soft.requires_grad_(False)
        own = self._likelihood(causal, self.soft)
        rows = {type(self).__name__: self.variant(own, folder.name), self.cf.name: self._cf_row()}
        if self.projection.item_vectors == "joint":
            text = replace(own, soft_tokens=self.soft.with_text_vectors())
            rows[TEXT_ONLY] = self.variant(text, folder.name, TEXT_ONLY)
        alone = self._without_soft_tokens(causal)
        return rows | {LLM_ONLY: self.variant(alone, self.plain_prompts.as_dict(), LLM_ONLY)}

    def _cf_row(self) -> Variant:
        def score(interaction: Any, candidates: Tensor) -> Tensor:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, histories_of(self, interaction), candidates)

        return Variant(score, self.cf.scores)


class SoftTokens(nn.Module):
    """Fills the soft slots of prompts: ``F_I`` of an item's code, ``F_U`` of a user's state.

    Args:
        cf: the collaborative model, loaded.
        codes: the vectors [I, Z] that stand for items.
        text_codes: those of their texts [I, Z].
        width: D.
    """

    def __init__(self, cf: Any, codes: Tensor, text_codes: Tensor, width: int):
        super().__init__()
        self._cf, self._codes, self._text_codes = cf, codes, text_codes
        self.project_user = Projector(cf.user_states([0], [[]]).shape[1], width, nn.LeakyReLU()).to(cf.device)
        self.project_item = Projector(codes.shape[1], width, nn.GELU()).to(cf.device)

    def user_key(self, row: int) -> int:
        """The key of the token of the user in a row of a call, behind those of the items."""
        return len(self._codes) + row

    def forward(
        self, prompts: Sequence[Prompt], histories: Sequence[Sequence[int]], users: Sequence[int]
    ) -> tuple[list[Prompt], Tensor | None]:
        """Prompts with numbered slots, and the vectors [S, D] for them."""
        return self.fill(prompts, list(zip(users, histories, strict=True)))

    def fill(self, prompts: Sequence[Prompt], asking: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[Prompt], Tensor | None]:
        """As :meth:`forward`; ``asking`` holds user and history by number of the user's token. Each token is made once."""
        numbered, keys = number_soft_tokens(prompts)
        items = [key for key in keys if key < len(self._codes)]  # then users
        tokens = [self.project_item(self._codes[items])] if items else []
        if keys[len(items) :]:
            users, histories = zip(*(asking[key - len(self._codes)] for key in keys[len(items) :]), strict=True)
            tokens.append(self.project_user(self._cf.user_states(users, histories)))
        return numbered, torch.cat(tokens) if tokens else None

    def with_text_vectors(self) -> SoftTokens:
        """The same projectors, with the codes of texts for all items."""
        other = copy.copy(self)
        other._codes = self._text_codes
        return other
