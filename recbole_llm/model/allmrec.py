"""ALLMRec: a frozen LLM that reads a collaborative model's users and items as soft tokens in its prompt.

Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender System", KDD
2024 (arXiv 2404.11343), "A-LLMRec". Nothing of the LM and of the collaborative model (SASRec) is ever changed. Two stages:

1. alignment (``model/alignment.py``): the item vectors of SASRec and the text vectors of SBERT are brought into one joint
   space, in which an item without interactions is represented by its text alone;
2. projection: two small networks map the user's state and the items' joint vectors to tokens of the LM, which learns
   nothing but answers with the title of the next item (eq. 8)::

       [F_U(x_u)] is a user representation. This user has watched "title"[F_I(e_i)], ... Recommend one next movie from
       "title"[F_I(e_j)], ... The recommendation is -> title

Candidates are ranked by the likelihood of their titles instead of by comparing strings with a generated answer.

Legend: B users, C candidates, I items, S soft tokens, H width of the collaborative model, Z of the joint space, D of the LM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains
from recbole_llm.data.domains import Row
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.builtin_text_encoder import builtin_stage
from recbole_llm.llm.finetune import Batches
from recbole_llm.llm.scoring import lm_loss
from recbole_llm.llm.text_encoder import item_sentences, load_text_encoder
from recbole_llm.model.alignment import AlignmentConfig, Projector, train_alignment
from recbole_llm.model.base import template, text_fields
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.files import fingerprint, save_tensors
from recbole_llm.store.stages import Stage
from recbole_llm.training.loop import TrainingLoop

TEXT_ONLY, LLM_ONLY = "text vectors", "LLM only"


class ALLMRec(LLMRanker):
    """SASRec aligned with SBERT, projected into a frozen LLM's token space."""

    uses_cf_model = True

    def __init__(self, config: Any, dataset: Any):
        if config["scorer"] == "label":
            raise ValueError("scorer: label asks for a label, ALLMRec for a title; choose tree, prefix or naive")
        super().__init__(config, dataset)
        self.cf = self._collaborative(config)
        self.recipe = AlignmentConfig.of(config, self.domain)
        self.encoder = {key: config[f"text_encoder_{key}"] for key in ("path", "revision")}
        self.builtin_encoder = config["builtin_text_encoder"]
        self.sentences = item_sentences(self.domain.items, text_fields(config))
        self.vectors = Path(config["checkpoint_dir"]) / "text_vectors"
        self.item_vectors = config["item_vectors"]
        if self.item_vectors not in ("joint", "text", "random"):
            raise ValueError(f"item_vectors: {self.item_vectors!r} is unknown; choose joint, text or random")
        self.cold_threshold = config["cold_threshold"]
        self.all_positions = config["all_positions"]
        self.train_samples = config["train_samples"]
        self.stage2 = {key: config[f"stage2_{key}"] for key in ("epochs", "batch_size", "learning_rate")}
        self._fresh_projectors()
        for kind in ("joint", "text"):
            self.register_buffer(f"{kind}_codes", torch.zeros(self.n_items, self.recipe.joint_size), persistent=False)  # [I, Z]

    def _prompt_settings(self, config: Any) -> dict[str, Any]:
        shared = super()._prompt_settings(config)
        text = template(config, config["soft_prompt"])
        self.plain_settings = {**shared, "template": text.replace("{user}", "")}  # without any soft token
        text = text.replace("{user}", config["user_text"] if config["user_representation"] else "")
        return {**shared, "template": text, "item_tokens": config["joint_embedding"]}

    def _fresh_projectors(self) -> None:
        width = self.lm.get_input_embeddings().weight.shape[1]
        self.project_user = Projector(self.cf.user_states([0], [[]]).shape[1], width, nn.LeakyReLU()).to(self.cf.device)
        self.project_item = Projector(self.recipe.joint_size, width, nn.GELU()).to(self.cf.device)

    def train(self, mode: bool = True) -> ALLMRec:
        super().train(mode)
        self.lm.eval()  # frozen also means without dropout
        return self

    # -- soft tokens ---------------------------------------------------------------------------------------------------

    def soft_tokens(
        self, prompts: list[list[int]], histories: Sequence[Sequence[int]], users: Sequence[int] | None
    ) -> tuple[list[list[int]], Tensor | None]:
        known = list(users) if users is not None else [0] * len(histories)
        return self._fill(prompts, [(user, history) for user, history in zip(known, histories, strict=True)])

    def _fill(self, rows: list[list[int]], asking: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[list[int]], Tensor | None]:
        """Rows whose ids below zero are numbered from -1 on, and the tokens [S, D] that they stand for, each made once.

        ``asking`` holds user and history by number of the user's token (:meth:`LLMRanker._user_tokens`).
        """
        found = sorted({-1 - token for row in rows for token in row if token < 0})  # items, then users
        items = [item for item in found if item < self.n_items]
        tokens = [self.project_item(self.item_codes[items])] if items else []
        if found[len(items) :]:
            users, histories = zip(*(asking[number - self.n_items] for number in found[len(items) :]), strict=True)
            tokens.append(self.project_user(self.cf.user_states(users, histories)))
        place = {-1 - number: -1 - row for row, number in enumerate(found)}
        return [[place.get(token, token) for token in row] for row in rows], torch.cat(tokens) if tokens else None

    @property
    def item_codes(self) -> Tensor:
        """The vectors [I, Z] that stand for items: ``e_i``, and ``q_i`` where training has not met the item often enough."""
        if self.item_vectors == "random":  # an ablation: as wide as the joint space, and without any meaning
            noise = torch.rand(self.joint_codes.shape, generator=torch.Generator().manual_seed(self.seed))
            return noise.to(self.joint_codes.device)
        if self.item_vectors == "text" or self.answering == TEXT_ONLY:
            return self.text_codes
        return torch.where(self._is_cold[:, None], self.text_codes, self.joint_codes)

    @cached_property
    def _is_cold(self) -> Tensor:
        return torch.from_numpy(self.histories.train_counts < self.cold_threshold).to(self.joint_codes.device)  # [I]

    # -- scores and controls -------------------------------------------------------------------------------------------

    def score_histories(
        self, histories: Sequence[Sequence[int]], candidates: Tensor, users: Sequence[int] | None = None
    ) -> Tensor:
        if self.answering == self.cf.name:
            return self.cf.candidate_scores(users or [0] * len(histories), histories, candidates)
        return super().score_histories(histories, candidates, users)

    @property
    def retriever(self) -> CollaborativeModel:  # type: ignore[override]
        """In a full ranking, the model's own collaborative model finds what the LM re-ranks."""
        return self.cf

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        text = {TEXT_ONLY: lambda: self._answering(TEXT_ONLY)} if self.item_vectors == "joint" else {}
        return {self.cf.name: lambda: self._answering(self.cf.name), **text, LLM_ONLY: self._without_soft_tokens}

    @cached_property
    def plain_prompts(self) -> PromptBuilder:
        """The same prompts without any soft token."""
        return self._prompt_builder(self.domain, self.plain_settings)

    @contextlib.contextmanager
    def _without_soft_tokens(self) -> Iterator[None]:
        """The LM alone, on the same prompts."""
        before, self.prompts = self.prompts, self.plain_prompts
        try:
            with self._answering(LLM_ONLY):
                yield
        finally:
            self.prompts = before

    def _prior(self, candidates: Tensor) -> Tensor:
        with self._without_soft_tokens():  # what nobody stands for is not something that the projectors have learned
            return super()._prior(candidates)

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        inputs, identity = [self.cf.stage], None
        if self.encoder["path"] == "builtin":
            inputs.append(builtin_stage(self.sentences, **self.builtin_encoder, seed=self.seed))
        else:
            identity = load_text_encoder(**self.encoder).fingerprint
        before: dict[str, Any] = {
            "recipe": self.recipe.as_dict(),
            "domain": self.domain.fingerprint,
            "sentences": fingerprint(self.sentences),
            "text_encoder": identity,
        }
        self.alignment = Stage("alignment", before, self._align, inputs=tuple(inputs))
        valid = self.asked["valid"]
        depends: dict[str, Any] = {
            "backbone": self.backbone_fingerprint,
            "domain": self.domain.fingerprint,
            "prompts": self.prompt_settings,
            "recipe": [self.stage2, self.all_positions, self.train_samples, self.seed],
            "items": [self.item_vectors, self.cold_threshold],
            "listed": [self.negatives, self.top_k_target] if self.prompts.shows_candidates else None,
            "valid": [valid.fingerprint, self.valid_users, self.normalize],
        }
        return Stage("projection", depends, self._project, inputs=(self.alignment,))

    def load(self, folder: Path) -> None:
        self._load_alignment()
        weights = load_file(folder / "projectors.safetensors")
        for name, parameter in self._projectors().items():
            parameter.data.copy_(weights[name])

    def _align(self, out: Path, scratch: Path) -> None:
        self.cf.load(self.cache.folder(self.cf.stage))
        _, *builtin = self.alignment.inputs
        source = {"path": self.cache.folder(builtin[0])} if builtin else self.encoder
        train_alignment(
            self.recipe,
            self.domain,
            self.cf,
            load_text_encoder(**source, device=self.cf.device),
            self.sentences,
            out=out,
            scratch=scratch,
            vectors=self.vectors,
            save_every=self.save_every,
            show_progress=self.show_progress,
        )

    def _load_alignment(self) -> None:
        self.cf.load(self.cache.folder(self.cf.stage))
        codes = load_file(self.cache.folder(self.alignment) / "codes.safetensors")
        self.joint_codes.copy_(codes["joint"])
        self.text_codes.copy_(codes["text"])

    def _projectors(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.startswith("project_")}

    def _project(self, out: Path, scratch: Path) -> None:
        """Stage 2: the LM's loss on the target's title trains the projectors (eq. 8)."""
        self._load_alignment()
        self._fresh_projectors()
        window = None if self.all_positions else domains.LAST_ONLY
        samples = domains.training_examples([self.domain], window=window, samples=self.train_samples, seed=self.seed)
        number = dict(zip(samples, self._user_tokens(len(samples)), strict=True))
        history = {row: self.domain.histories[row.user][: row.end] for row in samples}
        asking = [(row.user + 1, history[row].tolist()) for row in samples]

        def encode(row: Row, rng: np.random.Generator) -> tuple[list[int], list[int]]:
            target = self.domain.histories[row.user][row.end]
            return self._encode([*history[row].tolist(), int(target)], self.prompts, self.domain, rng, number[row])

        batches = Batches(samples, encode, self.stage2["batch_size"], 1, self.seed)
        parameters = self._projectors()

        def loss(micro: int) -> Tensor:
            rows, masks, share = batches[micro]
            rows, soft = self._fill(rows, asking)
            return share * lm_loss(self.lm, rows, masks, self.pad_token_id, soft=soft)

        total = batches.steps_per_epoch * self.stage2["epochs"]
        TrainingLoop(
            name="projection",
            parameters=parameters,
            optimizer=torch.optim.Adam(parameters.values(), lr=self.stage2["learning_rate"], betas=(0.9, 0.98)),
            loss=loss,
            total_steps=total,
            validate=self.asked["valid"].score,
            eval_every=max(1, -(-total // max(4, self.stage2["epochs"]))),
            folder=scratch / "loop",
            save_every=self.save_every,
            learning_rate_key="stage2_learning_rate",
            show_progress=self.show_progress,
        ).run()
        save_tensors(out / "projectors.safetensors", parameters)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Stage 2's loss of a batch of RecBole's (history, next item) rows: a scalar."""
        rng, histories = np.random.default_rng(self.seed), self._histories_of(interaction)
        targets, users = interaction[self.ITEM_ID].tolist(), interaction[self.USER_ID].tolist()
        encode = partial(self._encode, prompts=self.prompts, domain=self.domain, rng=rng)
        triples = zip(histories, targets, self._user_tokens(len(users)), strict=True)
        encoded = [encode([*history, target], user=token) for history, target, token in triples]
        rows, soft = self._fill([ids for ids, _ in encoded], list(zip(users, histories, strict=True)))
        return lm_loss(self.lm, rows, [mask for _, mask in encoded], self.pad_token_id, soft=soft)
