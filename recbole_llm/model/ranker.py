"""Base class of LLM rankers: scores [B, C] from histories and candidates; in a full ranking they re-rank a retriever's top N.

A model defines its stages (:meth:`LLMRanker.plan`) and the adapters that they train (:meth:`LLMRanker.adapters`). The first
adapter is the model's, the others are evaluated beside it. A model without adapters overrides :meth:`LLMRanker.rows`.

Legend: B users, C candidates, I items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.retriever import Retriever
from recbole_llm.costs.parts import blank, scoring_cost
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.evaluation.recommender import Facts, Recommender, Variant
from recbole_llm.llm.backbones import Backbone
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.finetune import LoRATrainingConfig
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.lora import AdapterView, load_adapters, unload
from recbole_llm.merging.arithmetic import MERGE_FILE
from recbole_llm.merging.report import draw_coefficients
from recbole_llm.model import assembly
from recbole_llm.model.adapters import AdapterTraining
from recbole_llm.model.parts import Parts, histories_of
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Folders, Stage, StageCache

SHUFFLED, NO_ADAPTER = "shuffled titles", "no adapter"


class LLMRanker(Recommender, SequentialRecommender):
    """Base of models that rank candidates by the likelihood of their titles.

    Attributes:
        parts: data, backbone, prompts and settings.
        adapter_training: trains the adapters.
        retriever: ranks the catalogue if the test is a full ranking, otherwise None.
        merge_report: ``merge.json`` of the model's adapter once it is loaded; None if it is not a merged one.
    """

    input_type = InputType.POINTWISE
    uses_item_text = True
    scores_unseen_items = True
    scores_full_catalogue = False
    trained_in_stages = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.parts = assembly.ranker_parts(config, dataset)
        self.adapter_training = AdapterTraining(self.parts, LoRATrainingConfig.of(config))
        self.retriever_top = config["retriever_top"]
        self.reranks = "test" not in config["candidate_phases"]
        self.retriever: CollaborativeModel | None = Retriever(config) if self.reranks and not self.uses_cf_model else None
        self.shuffled_title_control = config["shuffled_title_control"]
        self.merge_report: Mapping[str, Any] | None = None
        self._variants: dict[str, Variant] = {}
        self._unload: Callable[[], Any] = lambda: None

    def __str__(self) -> str:
        return f"{type(self).__name__}, backbone {self.parts.backbone.name}"

    @property
    def backbone(self) -> Backbone:
        return self.parts.backbone

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        """The stages of the model, those of :meth:`retrieval` included; the first one makes the model itself."""
        raise NotImplementedError

    def adapters(self, results: Folders) -> dict[str, Path]:
        """Folders of the adapters by name; the first one is the model's."""
        raise NotImplementedError

    def mixtures(self) -> dict[str, list[str]]:
        """Additional rows that mix adapters with equal weights: name -> adapters."""
        return {}

    def retrieval(self) -> Sequence[Stage]:
        """The retriever's stage, if there is a retriever."""
        return () if self.retriever is None else (self.retriever.stage,)

    def load(self, cache: StageCache) -> None:
        if self.retriever is not None:
            self.retriever.load(cache.folder(self.retriever.stage))
        self._variants = self.rows(self.parts.backbone.load(cache), cache)

    def variants(self) -> dict[str, Variant]:
        return self._variants

    def facts(self) -> Facts:
        backbone = self.parts.backbone
        return Facts(backbone.name, backbone.fingerprint, self.merge_report, backbone.identity, backbone.builtin)

    def report(self, folder: Path) -> list[str]:
        if self.merge_report is None:
            return []
        return draw_coefficients(folder / "coefficients.png", self.merge_report["weights"], self.merge_report["method"])

    def rows(self, causal: CausalLM, cache: StageCache) -> dict[str, Variant]:
        """The model, the other adapters, the mixtures, the LM without adapters and, if enabled, the shuffled-title control."""
        folders = self.adapters(cache)
        self._unload()  # the adapters of an earlier load
        model = load_adapters(causal.model, folders)
        self._unload = partial(unload, model)
        answer = next(iter(folders))
        record = folders[answer] / MERGE_FILE
        self.merge_report = json.loads(record.read_text()) if record.is_file() else None
        chosen = self._mixed(folders)
        likelihood = self.parts.likelihood(causal)
        identity = {name: f"{folder.parent.name}/{folder.name}" for name, folder in folders.items()}

        def row(weights: Mapping[str, float], prompts: PromptBuilder | None = None, *what: Any) -> Variant:
            view = AdapterView(model, weights, fold=True)
            own = likelihood if prompts is None else self.parts.likelihood(causal, prompts)
            return self.variant(own.with_lm(view), [[identity[name], weight] for name, weight in weights.items()], *what)

        rows = {name: row(weights) for name, weights in chosen.items()}
        if self.shuffled_title_control:
            prompts = self.parts.builder(causal.tokenizer, names=self._shuffled_names())
            rows[SHUFFLED] = row({answer: 1.0}, prompts, SHUFFLED, self.parts.seed)
            rows[f"{NO_ADAPTER}, {SHUFFLED}"] = row({}, prompts, SHUFFLED, self.parts.seed)
        return rows

    def _mixed(self, folders: Mapping[str, Path]) -> dict[str, Mapping[str, float]]:
        """Adapter -> weight of each row with true titles."""
        answer, *others = folders
        mixed = {name: dict.fromkeys(parts, 1 / len(parts)) for name, parts in self.mixtures().items()}
        return {type(self).__name__: {answer: 1.0}, **mixed, **{name: {name: 1.0} for name in others}, NO_ADAPTER: {}}

    def evaluated(self, causal: CausalLM, results: Folders) -> Sequence[tuple[TitleLikelihood, int]]:
        """The likelihoods of :meth:`rows` without adapters, for their cost; each with the number of rows that cost the same."""
        found = [(self.parts.likelihood(causal), len(self._mixed(self.adapters(results))))]
        if self.shuffled_title_control:
            prompts = self.parts.builder(causal.tokenizer, names=self._shuffled_names())
            found.append((self.parts.likelihood(causal, prompts), 2))
        return found

    def cost(self, batches: Sequence[tuple[Any, Tensor | None]], results: Folders, *, all_rows: bool) -> Cost:
        outline = self.backbone.outline
        rows = self.evaluated(blank(outline), results)
        if not all_rows:
            rows = [(rows[0][0], 1)]
        scored = [(partial(self._score_batch, own), number) for own, number in rows]
        known = [(interaction, self._any(interaction) if some is None else some) for interaction, some in batches]
        users = sum(len(candidates) for _, candidates in known)
        exact = all(some is not None for _, some in batches)
        note = "" if exact else f"random items in place of the {self.retriever_top} that the retriever will choose"
        return replace(scoring_cost(outline, scored, known, users=users, note=note), exact=exact)

    def _any(self, interaction: Any) -> Tensor:
        """As many random items [B, N] as are re-ranked."""
        drawn = np.random.default_rng(self.parts.seed).integers(1, self.n_items, (len(interaction), self.retriever_top))
        return torch.from_numpy(drawn)

    def _score_batch(self, likelihood: TitleLikelihood, batch: tuple[Any, Tensor]) -> Tensor:
        return self._scored(likelihood, *batch)

    def _scored(self, likelihood: TitleLikelihood, interaction: Any, candidates: Tensor) -> Tensor:
        return likelihood(histories_of(self, interaction), candidates, interaction[self.USER_ID].tolist())

    def _shuffled_names(self) -> list[str]:
        """The catalogue's titles, permuted so that each item has the title of another, in histories and candidates.

        The interactions and the set of titles do not change. The metrics of this control therefore do not come from the LM's
        knowledge of the titles, such as their meaning or memorized parts of this dataset.
        """
        names = self.parts.domain.items.names
        places = np.random.default_rng(self.parts.seed).permutation(np.arange(1, len(names)))
        shuffled = list(names)
        for place, other in zip(places, np.roll(places, 1), strict=True):  # a single cycle: no item has its own title
            shuffled[place] = names[other]
        return shuffled

    def variant(self, likelihood: TitleLikelihood, *depends: Any) -> Variant:
        """A row whose scores are likelihoods.

        Args:
            depends: JSON-serializable values that determine the scores besides settings, histories and code.
        """

        def score(interaction: Any, candidates: Tensor) -> Tensor:
            return self._scored(likelihood, interaction, candidates)

        kinds = [*type(self).__mro__, *type(self.parts).__mro__]
        own = {
            kind.__module__ for kind in kinds if issubclass(kind, Recommender | Parts)
        }  # not the training code that they import
        runs = [likelihood, likelihood.prompts, likelihood.scorer, likelihood.soft_tokens, self.parts.backbone]
        runs += [AdapterView] if isinstance(likelihood.lm, AdapterView) else []
        code = code_fingerprint(*{part.__module__ for part in runs if part is not None}, alone=own)
        return self._row(score, code, depends)

    def scored_by(self, score: Callable[[Any, Tensor], Tensor], *depends: Any) -> Variant:
        """A row with scores ``(interaction, candidates [B, C]) -> [B, C]``; ``depends`` as in :meth:`variant`."""
        return self._row(score, code_fingerprint(type(self).__module__), depends)

    def _row(self, score: Callable[[Any, Tensor], Tensor], code: str, depends: Sequence[Any]) -> Variant:
        identity = fingerprint([code, self.parts.scores_depend_on(), self.parts.histories.fingerprint, list(depends)])
        return Variant(score, lambda interaction: self._rerank(interaction, score), identity)

    def predict(self, interaction: Any) -> Tensor:
        """Scores [B] of one item for each user."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)  # [B]

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C], in fp32, of candidates [B, C]."""
        return next(iter(self._variants.values())).score(interaction, candidates)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue."""
        return next(iter(self._variants.values())).score_catalogue(interaction)

    @torch.no_grad()
    def _rerank(self, interaction: Any, score: Any) -> Tensor:
        """The retriever's scores [B, I] of the catalogue, with its top ``retriever_top`` items in the LLM's order.

        The highest scores are reassigned in that order, so each re-ranked item scores above all other items.
        """
        if self.retriever is None:
            raise ValueError("eval_args: ranking the catalogue needs a retriever, which this run does not have; give mode: full")
        scores = self.retriever.scores(interaction).float()  # [B, I]
        scores[:, 0] = -torch.inf
        best, items = scores.topk(self.retriever_top, dim=1)  # [B, N]
        order = score(interaction, items).argsort(dim=1, descending=True, stable=True)  # [B, N]
        return scores.scatter(1, items.gather(1, order), best)  # [B, I]
