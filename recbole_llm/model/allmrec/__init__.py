"""ALLMRec: a frozen LLM whose prompt contains a collaborative model's users and items as soft tokens.

Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender System", KDD
2024 (arXiv 2404.11343), "A-LLMRec". The LM and the collaborative model (SASRec) are frozen. Two stages:

1. alignment (``alignment.py``): SASRec's item vectors and SBERT's text vectors are mapped to one joint space, in which
   the text vector represents an item without interactions;
2. projection (``projection.py``): two small networks map the user's state and the items' joint vectors to the LM's
   input space; their loss is the LM's on the title of the next item (eq. 8)::

       [F_U(x_u)] is a user representation. This user has watched "title"[F_I(e_i)], ... Recommend one next movie from
       "title"[F_I(e_j)], ... The recommendation is -> title

Candidates are ranked by the likelihood of their titles, not by matching a generated answer.

Legend: B users, C candidates, I items, S soft tokens, H width of the collaborative model, Z of the joint space, D of the LM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.examples import check_negatives
from recbole_llm.data.items import text_fields
from recbole_llm.data.templates import template
from recbole_llm.evaluation.published import ALLMREC
from recbole_llm.evaluation.recommender import Facts, Variant
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import item_sentences
from recbole_llm.model.allmrec.alignment_training import AlignmentConfig, AlignmentTraining
from recbole_llm.model.allmrec.projection import ProjectionConfig, ProjectionTraining, SoftTokens
from recbole_llm.model.parts import histories_of
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.files import fingerprint
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Folders, Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

TEXT_ONLY, LLM_ONLY = "text vectors", "LLM only"


class ALLMRec(LLMRanker):
    """SASRec aligned with SBERT, projected into a frozen LLM's token space."""

    uses_cf_model = True
    published = ALLMREC

    def __init__(self, config: Any, dataset: Any):
        if config["scorer"] == "label":
            raise ValueError("scorer: label scores labels, but ALLMRec predicts titles; choose tree, prefix or naive")
        super().__init__(config, dataset)
        prompt = template(config, config["soft_prompt"])
        self.plain_prompts = replace(self.parts.prompts, template=prompt.replace("{user}", ""))  # without any soft token
        if config["user_representation"] and not ("{user}" in prompt and "{user}" in config["user_text"]):
            raise ValueError(
                f"soft_prompt: {config['soft_prompt']}, with user_text, needs the slot {{user}} for the user's soft token: "
                f"{prompt!r}, {config['user_text']!r}; choose allmrec or allmrec_history, or user_representation: False"
            )
        if not (config["user_representation"] or config["joint_embedding"]):
            raise ValueError("user_representation and joint_embedding: without both there is no soft token to train; enable one")
        user = config["user_text"] if config["user_representation"] else ""
        soft = replace(
            self.plain_prompts,
            template=prompt.replace("{user}", user),
            user_before_bos=config["user_before_bos"] and bool(user),
            item_tokens=config["joint_embedding"],
        )
        examples = replace(self.parts.examples, whole_histories=False)
        self.parts = replace(self.parts, prompts=soft, examples=examples)
        self.cf = CollaborativeModel.of(config, self.parts.histories, self.max_seq_length)
        _ = self.cf.item_table, self.cf.user_states([0], [[]])  # raises before training if there are no such vectors
        if self.reranks:
            self.retriever = self.cf
        domain = self.parts.domain
        if soft.shows_candidates:
            check_negatives(domain, examples)
        alignment = AlignmentConfig.of(config, interactions=sum(map(len, self.parts.histories.items)))
        sentences = item_sentences(domain.items, text_fields(config, domain.items, described=True))
        self.text = TextBackbone(config, sentences, trained=alignment.tune_text_encoder)
        self.alignment = AlignmentTraining(alignment, domain, self.cf, self.text, self.parts.options)
        self.projection = ProjectionTraining(
            ProjectionConfig.of(config), self.parts, self.plain_prompts, self.cf, self.alignment.stage(), alignment.joint_size
        )

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        if tokenizer := self.parts.backbone.tokenizer:
            self.parts.builder(tokenizer)  # raises before training if the prompts do not suit the tokenizer
        self.projection_stage = self.projection.stage(self.parts.eval_users(candidates) if self.parts.validates else None)
        return [self.projection_stage, *self.other_stages()]

    def soft_tokens_of(self, titles: Sequence[str], soft: SoftTokens, results: Folders) -> SoftTokens:
        """The soft tokens of a row, with those of the texts of new items after the catalogue.

        Raises:
            ValueError: the vectors of the items are random.
        """
        if self.projection.config.item_vectors == "random":
            raise ValueError("item_vectors: random has no vector for a title; give titles or ids of the catalogue")
        return soft.with_new_items(self.alignment.text_codes(titles, results))

    def facts(self) -> Facts:
        lm, text = super().facts(), self.text
        return replace(
            lm,
            backbone=f"{lm.backbone}, {text.name}",
            backbone_fingerprint=fingerprint([lm.backbone_fingerprint, text.fingerprint]),
            backbone_identity=f"{lm.backbone_identity}, {text.identity}",
            builtin=(*lm.builtin, *text.builtin),
        )

    def evaluated(self, causal: CausalLM, results: Folders) -> Sequence[tuple[TitleLikelihood, int]]:
        own = self.projection.likelihood(causal, self.projection.blank_soft(causal))
        rows = 1 + (self.projection.config.item_vectors == "joint")  # and that with text vectors
        return [(own, rows), (self.projection.without_soft_tokens(causal), 1)]

    def answering(self, causal: CausalLM) -> Sequence[tuple[TitleLikelihood, int]]:
        own = self.projection.likelihood(causal, self.projection.blank_soft(causal))
        return [(own, 1), (self.projection.without_soft_tokens(causal), 1)]

    def rows(self, causal: CausalLM, cache: StageCache) -> dict[str, Variant]:
        """The model, its collaborative model, the model with text vectors for all items, and the LM without soft tokens."""
        folder = cache.folder(self.projection_stage)
        self.text.read_name(cache)
        with preserved_random_state():
            self.soft = self.projection.soft_tokens(cache, causal)
        self.soft.load_state_dict(load_file(folder / "projectors.safetensors"))
        self.soft.requires_grad_(False)
        own = self.projection.likelihood(causal, self.soft)

        def cf_score(interaction: Any, candidates: Tensor) -> Tensor:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, histories_of(self, interaction), candidates)  # [B, C]

        generator = self.generator(causal)
        rows = {type(self).__name__: self.variant(own, folder.name, generator=generator)}
        rows[self.cf.name] = Variant(cf_score, self.cf.scores)
        if self.projection.config.item_vectors == "joint":
            text = replace(own, soft_tokens=self.soft.with_text_vectors())
            rows[TEXT_ONLY] = self.variant(text, folder.name, TEXT_ONLY)
        alone = self.projection.without_soft_tokens(causal)
        return rows | {LLM_ONLY: self.variant(alone, self.plain_prompts.as_dict(), LLM_ONLY, generator=generator)}
