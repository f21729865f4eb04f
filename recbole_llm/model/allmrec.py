"""ALLMRec: a frozen LLM that reads a collaborative model's users and items as soft tokens in its prompt.

Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender System", KDD
2024 (arXiv 2404.11343), "A-LLMRec". Nothing of the LM and of the collaborative model (SASRec) is ever changed. Two stages:

1. alignment (``model/alignment.py``): the item vectors of SASRec and the text vectors of SBERT are brought into one joint
   space, in which an item without interactions is represented by its text alone;
2. projection (``model/projection.py``): two small networks map the user's state and the items' joint vectors to tokens of
   the LM; they are trained by the LM's loss on the title of the next item (eq. 8)::

       [F_U(x_u)] is a user representation. This user has watched "title"[F_I(e_i)], ... Recommend one next movie from
       "title"[F_I(e_j)], ... The recommendation is -> title

Candidates are ranked by the likelihood of their titles instead of by comparing strings with a generated answer.

Legend: B users, C candidates, I items, S soft tokens, H width of the collaborative model, Z of the joint space, D of the LM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.items import text_fields
from recbole_llm.data.prompts import template
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import item_sentences
from recbole_llm.model.alignment import AlignmentConfig, AlignmentTraining
from recbole_llm.model.parts import histories_of
from recbole_llm.model.projection import ProjectionConfig, ProjectionTraining
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.files import preserved_random_state
from recbole_llm.store.stages import Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

TEXT_ONLY, LLM_ONLY = "text vectors", "LLM only"


class ALLMRec(LLMRanker):
    """SASRec aligned with SBERT, projected into a frozen LLM's token space."""

    uses_cf_model = True

    def __init__(self, config: Any, dataset: Any):
        if config["scorer"] == "label":
            raise ValueError("scorer: label reads a label, ALLMRec answers with a title; choose tree, prefix or naive")
        super().__init__(config, dataset)
        prompt = template(config, config["soft_prompt"])
        self.plain_prompts = replace(self.parts.prompts, template=prompt.replace("{user}", ""))  # without any soft token
        user = config["user_text"] if config["user_representation"] else ""
        soft = replace(self.plain_prompts, template=prompt.replace("{user}", user), item_tokens=config["joint_embedding"])
        examples = replace(self.parts.examples, whole_histories=False)
        self.parts = replace(self.parts, prompts=soft, examples=examples)
        self.cf = CollaborativeModel.of(config, self.parts.histories, self.max_seq_length)
        # a model without vectors that could be read is refused now, not after a training
        _ = self.cf.item_table, self.cf.user_states([0], [[]])
        if self.reranks:  # in a full ranking, the model's own collaborative model finds what the LM re-ranks
            self.retriever = self.cf
        domain = self.parts.domain
        alignment = AlignmentConfig.of(config, interactions=sum(map(len, domain.histories)))
        text = TextBackbone(config, item_sentences(domain.items, text_fields(config)))
        self.alignment = AlignmentTraining(alignment, domain, self.cf, text, self.parts.options)
        self.projection = ProjectionTraining(
            ProjectionConfig.of(config), self.parts, self.plain_prompts, self.cf, self.alignment.stage()
        )

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        if tokenizer := self.parts.backbone.tokenizer:
            self.parts.builder(tokenizer)  # what does not fit it is refused before anything is trained
        self.projection_stage = self.projection.stage(self.parts.eval_users(candidates))
        return [self.projection_stage]

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, causal: CausalLM, cache: StageCache) -> dict[str, Variant]:
        """The model, its collaborative model, itself with text vectors for all items, and the LM alone."""
        folder = cache.folder(self.projection_stage)
        with preserved_random_state():
            self.soft = self.projection.soft_tokens(cache, causal)
        weights = load_file(folder / "projectors.safetensors")
        self.soft.load_state_dict(weights)
        self.soft.requires_grad_(False)
        own = self.projection.likelihood(causal, self.soft)
        rows = {type(self).__name__: self.variant(own, folder.name), self.cf.name: self._cf_row()}
        if self.projection.config.item_vectors == "joint":
            text = replace(own, soft_tokens=self.soft.with_text_vectors())
            rows[TEXT_ONLY] = self.variant(text, folder.name, TEXT_ONLY)
        alone = self.projection.without_soft_tokens(causal)
        return rows | {LLM_ONLY: self.variant(alone, self.plain_prompts.as_dict(), LLM_ONLY)}

    def _cf_row(self) -> Variant:
        def score(interaction: Any, candidates: Tensor) -> Tensor:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, histories_of(self, interaction), candidates)

        return Variant(score, self.cf.scores)
