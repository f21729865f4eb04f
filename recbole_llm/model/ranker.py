"""Base class of LLM rankers: scores [B, C] from histories and candidates; in a full ranking they re-rank a retriever's top N.

A model says which adapters it trains (:meth:`LLMRanker.trained`). The first one is the model's, the others are evaluated beside
it. A model that merges them sets ``merge_rows`` and overrides :meth:`LLMRanker.plan`; one without adapters overrides
:meth:`LLMRanker.plan` and :meth:`LLMRanker.rows`.

Legend: B users, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.retriever import Retriever
from recbole_llm.costs.lora import AdapterShape
from recbole_llm.costs.parts import blank
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.evaluation.full_ranking import ranked_catalogue
from recbole_llm.evaluation.recommender import Facts, Recommender, StagedRecommender, Variant
from recbole_llm.llm.backbones import Backbone
from recbole_llm.llm.causal_lm import CausalLM, load_config
from recbole_llm.llm.finetune import LoRATrainingConfig
from recbole_llm.llm.generation import Generator, check_generates
from recbole_llm.llm.likelihood import TitleLikelihood, remembering
from recbole_llm.llm.lora import AdapterView, load_adapters, unload
from recbole_llm.merging.full_model import target_folder, write_full_model
from recbole_llm.merging.report import draw_merge, merge_record
from recbole_llm.model import assembly
from recbole_llm.model.adapters import AdapterSpec, AdapterTraining
from recbole_llm.model.given_adapters import GivenAdapters
from recbole_llm.model.memorised import Memorised
from recbole_llm.model.merges.rows import MergeRows
from recbole_llm.model.parts import Parts, histories_of
from recbole_llm.model.published_answers import PublishedAnswers
from recbole_llm.model.ranker_costs import answers_cost, scores_cost
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.registry import NO_ADAPTER, SHUFFLED
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Folders, Stage, StageCache


class LLMRanker(StagedRecommender, SequentialRecommender):
    """Base of models that rank candidates by the likelihood of their titles.

    Attributes:
        parts: data, backbone, prompts and settings.
        adapter_training: trains the adapters.
        given: the adapters that the user gives in place of a training.
        sources: the stage of each adapter of :meth:`trained`, once they are planned.
        memorised: what the LM knows of the catalogue before any training.
        retriever: ranks the catalogue if the test is a full ranking, otherwise None.
        merge_rows: the merges of a model that merges its adapters.
        measures_merges: the stage of ``merge_report``, if it is planned.
        decoded_titles: largest number of titles of an answer that a stage decodes.
        merge_report: ``merge.json`` of the loaded adapter, with that stage's ``report``; None if it is not a merged one.
    """

    uses_item_text = True
    scores_unseen_items = True
    scores_full_catalogue = False
    decoded_titles = 0
    merge_rows: MergeRows | None = None

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.parts = self.assembled(config, dataset)
        self.adapter_training = AdapterTraining(self.parts, LoRATrainingConfig.of(config))
        self.given = GivenAdapters(config["adapters"] or {}, self.parts.backbone)
        self.sources: dict[str, Stage] = {}
        self.retriever_top = config["retriever_top"]
        self.reranks = "test" not in config["candidate_phases"]
        retrieves, histories = self.reranks and not self.uses_cf_model, self.parts.histories
        self.retriever: CollaborativeModel | None = Retriever(config, histories, self.max_seq_length) if retrieves else None
        self.shuffled_title_control = config["shuffled_title_control"]
        self.memorised = Memorised(self.parts, config["memorisation"])
        self.generates = config["scoring"] == "published"
        if self.published is not None:  # an answer of one label is no title
            self.published = None if self.parts.scoring.reads_labels else self.published.with_settings(config)
        self.measures_merges: Stage | None = None
        self.merge_report: Mapping[str, Any] | None = None
        self._variants: dict[str, Variant] = {}
        self.full_model = target_folder(config["merge_full_model"] or None, "merge_full_model")
        self._merged: tuple[str | Path, Path] | None = None  # the base model and the merged adapter
        self._unload: Callable[[], Any] = lambda: None

    def assembled(self, config: Any, dataset: Any) -> RankerParts:
        """The parts of the model."""
        return assembly.ranker_parts(config, dataset, vectors=self.uses_cf_model)  # by soft tokens

    def __str__(self) -> str:
        return f"{type(self).__name__}, backbone {self.parts.backbone.name}"

    @property
    def backbone(self) -> Backbone:
        return self.parts.backbone

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        """The adapters that the model trains, by the names that tables show and ``adapters`` takes; the first is the model's."""
        return {}

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        """The stages of the model, those of :meth:`other_stages` included; the first one makes the model itself."""
        return [*self.adapter_stages(candidates).values(), *self.other_stages()]

    def adapter_stages(self, candidates: Mapping[str, CandidateSet]) -> dict[str, Stage]:
        """The stages of :meth:`trained`; that of a given adapter copies its folder.

        Raises:
            ValueError: a given adapter is none of the model's, or cannot be used.
        """
        specs = self.trained(candidates)
        self.given.check_names(specs, type(self).__name__)
        stages = self.adapter_training.stage
        self.sources = {n: self.given.stage(n) if n in self.given.given else stages(spec) for n, spec in specs.items()}
        return self.sources

    def adapters(self, results: Folders) -> dict[str, Path]:
        """Folders of the adapters by name; the first one is the model's: a merged one, if it merges."""
        merged = self.merge_rows.folders(results) if self.merge_rows else {}
        return merged | {name: results.folder(stage) for name, stage in self.sources.items()}

    def mixtures(self) -> dict[str, list[str]]:
        """Additional rows that mix adapters with equal weights: name -> adapters."""
        return {}

    def check_rows(self, key: str, names: Iterable[str]) -> None:
        """Refuse additional rows whose names are taken; the stages of :meth:`adapter_stages` are planned before.

        Raises:
            ValueError: names the key and the name.
        """
        model = type(self).__name__
        known = {model, "merged", NO_ADAPTER, SHUFFLED, f"{NO_ADAPTER}, {SHUFFLED}", *self.sources, *self.mixtures()}
        if taken := known.intersection(names):
            raise ValueError(f"{key}: {min(taken)!r} is the name of a row or an adapter of {model}; choose another name")

    def other_stages(self) -> Sequence[Stage]:
        """The stages of the retriever, of :attr:`memorised` and of :attr:`measures_merges`, if there are any."""
        measures = [self.measures_merges] if self.measures_merges else []
        return [*([self.retriever.stage] if self.retriever else []), *self.memorised.stages, *measures]

    def check(self) -> None:
        examples = self.parts.examples
        candidates = max(examples.num_negatives + 1, self.retriever_top if self.reranks else 1)
        self.parts.check(candidates=candidates, titles=examples.top_k_target, decoded=self.decoded_titles)
        if self.generates and self.published is not None and not self.parts.backbone.builtin:
            check_generates(load_config(self.parts.backbone.base_name, self.parts.backbone.revision))

    def load(self, cache: StageCache) -> None:
        if self.retriever is not None:
            self.retriever.load(cache.folder(self.retriever.stage))
        self.memorised.load(cache)
        self._variants = self.rows(self.parts.backbone.load(cache), cache)

    def variants(self) -> dict[str, Variant]:
        return self._variants

    def facts(self) -> Facts:
        lm, given = self.parts.backbone, self.given.facts()
        facts = Facts(lm.name, lm.fingerprint, self.merge_report, lm.identity, given, lm.builtin, self.memorised.found)
        return self.merge_rows.facts(facts) if self.merge_rows else facts

    def report(self, folder: Path) -> list[str]:
        lines = self.memorised.lines()
        if self.merge_report is not None and self._merged is not None:
            lines += draw_merge(folder, self.merge_report)
            if self.full_model is not None:
                lines.append(write_full_model(*self._merged, self.full_model, revision=self.parts.backbone.revision))
        return lines

    def rows(self, causal: CausalLM, cache: StageCache) -> dict[str, Variant]:
        """The model, the other adapters, the mixtures, the LM without adapters and, if enabled, the shuffled-title control."""
        folders = self.adapters(cache)
        self._unload()  # the adapters of an earlier load
        model = load_adapters(causal.model, folders)
        self._unload = partial(unload, model)
        answer = next(iter(folders))
        self.merge_report = merge_record(folders[answer], cache.folder(self.measures_merges) if self.measures_merges else None)
        self._merged = self.parts.backbone.source(cache), folders[answer]
        likelihood = self.parts.likelihood(causal)
        identity = {name: f"{folder.parent.name}/{folder.name}" for name, folder in folders.items()}

        def row(
            weights: Mapping[str, float], prompts: PromptBuilder | None = None, *what: Any, generator: Generator | None = None
        ) -> Variant:
            view = AdapterView(model, weights, fold=True)
            own = likelihood if prompts is None else self.parts.likelihood(causal, prompts)
            depends = [[identity[name], weight] for name, weight in weights.items()]
            return self.variant(own.with_lm(view), depends, *what, generator=generator)

        published = dict.fromkeys((type(self).__name__, NO_ADAPTER), self.generator(causal))
        rows = {name: row(weights, generator=published.get(name)) for name, weights in self._mixed(folders).items()}
        if prompts := self._shuffled(causal):
            rows[SHUFFLED] = row({answer: 1.0}, prompts, SHUFFLED, self.parts.seed)
            rows[f"{NO_ADAPTER}, {SHUFFLED}"] = row({}, prompts, SHUFFLED, self.parts.seed)
        return rows

    def _mixed(self, folders: Mapping[str, Path]) -> dict[str, Mapping[str, float]]:
        """Adapter -> weight of each row with true titles; a model without adapters has one row."""
        if not folders:
            return {type(self).__name__: {}}
        answer, *others = folders
        mixed = {name: dict.fromkeys(parts, 1 / len(parts)) for name, parts in self.mixtures().items()}
        return {type(self).__name__: {answer: 1.0}, **mixed, **{self.given.label(n): {n: 1.0} for n in others}, NO_ADAPTER: {}}

    def evaluated(self, causal: CausalLM, results: Folders) -> Sequence[tuple[TitleLikelihood, int]]:
        """The likelihoods of :meth:`rows` without adapters, for their cost; each with the number of rows that cost the same."""
        found = [(self.parts.likelihood(causal), len(self._mixed(self.adapters(results))))]
        if prompts := self._shuffled(causal):
            found.append((self.parts.likelihood(causal, prompts), 2))
        return found

    def _shuffled(self, causal: CausalLM) -> PromptBuilder | None:
        names = self.parts.shuffled_names() if self.shuffled_title_control else None
        return self.parts.builder(causal.tokenizer, names=names) if names else None

    def answering(self, causal: CausalLM) -> Sequence[tuple[TitleLikelihood, int]]:
        """As :meth:`evaluated`, for the rows that generate answers."""
        return [(self.parts.likelihood(causal), 2)]

    def cost(self, batches: Sequence[tuple[Any, Tensor | None]], results: Folders, *, all_rows: bool) -> Cost:
        outline = self.backbone.outline
        rows = self.evaluated(blank(outline), results)
        chosen, reranked = rows if all_rows else [(rows[0][0], 1)], (self.n_items, self.retriever_top)
        return scores_cost(outline, chosen, self._scored, batches, reranked=reranked, seed=self.parts.seed)

    def answers_cost(self, candidates: CandidateSet) -> Cost | None:
        if self._published is None:
            return None
        causal = blank(self.backbone.outline)
        generator, inputs = self._published.generator(causal), self._published.inputs
        return answers_cost(self.backbone.outline, self.answering(causal), generator, inputs, candidates)

    def shape(self, name: str) -> AdapterShape:
        """The sizes of one of the adapters of :meth:`trained`, for costs."""
        if name in self.given.given:
            return self.given.shape(name)
        return AdapterShape.of(self.backbone.outline, self.adapter_training.config)

    def _scored(self, likelihood: TitleLikelihood, interaction: Any, candidates: Tensor) -> Tensor:
        return likelihood(histories_of(self, interaction), candidates, interaction[self.USER_ID].tolist())

    def generator(self, causal: CausalLM) -> Generator | None:
        return self._published.generator(causal) if self._published else None

    @property
    def _published(self) -> PublishedAnswers | None:
        return PublishedAnswers(self.published, self.parts, self.max_seq_length) if self.published else None

    def variant(self, likelihood: TitleLikelihood, *depends: Any, generator: Generator | None = None) -> Variant:
        """A row whose scores are likelihoods.

        Args:
            depends: JSON-serializable values that determine the scores besides settings, histories and code.
            generator: decodes the row's answers for the published protocol; None if it has none.
        """
        found = self._row(partial(self._scored, remembering(likelihood)), self._code(likelihood, likelihood.scorer), depends)
        if generator is None or self._published is None:
            return found
        code = self._code(likelihood, generator, self.published, self._published)
        return replace(found, answers=self._published.of_row(generator, likelihood, [code, list(depends)]))

    def _code(self, likelihood: TitleLikelihood, *others: object) -> str:
        """Fingerprint of the code that runs when a likelihood's LM reads its prompts, and of ``others``."""
        kinds = [*type(self).__mro__, *type(self.parts).__mro__]
        own = {kind.__module__ for kind in kinds if issubclass(kind, Recommender | Parts)}  # not what they import
        runs = [likelihood, likelihood.prompts, likelihood.soft_tokens, self.backbone, *others]
        runs += [AdapterView] if isinstance(likelihood.lm, AdapterView) else []
        return code_fingerprint(*{part.__module__ for part in runs if part is not None}, alone=own)

    def scored_by(self, score: Callable[[Any, Tensor], Tensor], *depends: Any) -> Variant:
        """A row with scores ``(interaction, candidates [B, C]) -> [B, C]``; ``depends`` as in :meth:`variant`."""
        return self._row(score, code_fingerprint(type(self).__module__), depends)

    def _row(self, score: Callable[[Any, Tensor], Tensor], code: str, depends: Sequence[Any]) -> Variant:
        read = [self.parts.histories.fingerprint, self.max_seq_length]  # rows are cut to MAX_ITEM_LIST_LENGTH
        identity = fingerprint([code, self.parts.scores_depend_on(), *read, list(depends)])
        return Variant(score, self._retrieved, identity, reranked=self.retriever_top)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue, history included: the retriever's, with its top items in the LLM's order."""
        return ranked_catalogue(next(iter(self._variants.values())), interaction, self.USER_ID, self.parts.histories)

    def _retrieved(self, interaction: Any) -> Tensor:
        """The retriever's scores [B, I]."""
        if self.retriever is None:
            raise ValueError("eval_args: ranking the catalogue needs a retriever, which this run lacks; give mode: full")
        return self.retriever.scores(interaction)
