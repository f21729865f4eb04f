"""The merge stage of rankers: all weights are frozen, and the method that ``merge`` names chooses the coefficients.

The result is one ordinary PEFT adapter, so inference costs the same as with a single adapter. For the methods see
:mod:`recbole_llm.merging.stage`.

Legend: K adapters, M adapted modules, C candidates.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.costs.lora import AdapterShape
from recbole_llm.costs.merging import merge_cost
from recbole_llm.costs.parts import blank, remembered
from recbole_llm.llm.causal_lm import blank_model
from recbole_llm.llm.forward import loss_scale
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.lora import AdapterView, adapters_loaded, lora_modules
from recbole_llm.llm.packing import token_batches
from recbole_llm.merging import coefficients, methods, rules
from recbole_llm.merging.coefficients import MergeProblem, given_weights, lattice_points
from recbole_llm.merging.folders import BUILTIN, READERS
from recbole_llm.merging.full_model import check_foldable
from recbole_llm.merging.objectives import Counted, candidate_entropy, first_tokens_entropy, mean_over_batches
from recbole_llm.merging.stage import merge_adapters, resolve
from recbole_llm.model.merges.labelled_users import LabelledUsers
from recbole_llm.model.merges.lattice_scores import LatticeScores, read_scores
from recbole_llm.model.merges.scored_users import Compute
from recbole_llm.model.merges.settings import MergeSettings
from recbole_llm.model.parts import gradient_batch_tokens
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.prompts import PromptBuilder
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.store.costs import Cost


@dataclass(frozen=True)
class AdapterMerging:
    """Merges the adapters of earlier stages.

    Attributes:
        others: settings of the merges that are evaluated beside it, by the name of the row.
        shape: that of the adapter of a name.
        builder: the prompts for a tokenizer; those of a large catalogue take seconds, so all merges of a run share them.
        folds: the mixture is also folded into the weights of the LM (``merge_full_model``).
    """

    parts: RankerParts
    settings: MergeSettings
    others: Mapping[str, MergeSettings]
    shape: Callable[[str], AdapterShape]
    builder: Callable[[Any], PromptBuilder]
    folds: bool = False

    @classmethod
    def of(cls, config: Any, parts: RankerParts, shape: Callable[[str], AdapterShape]) -> AdapterMerging:
        """The merging of a configuration; raises as :class:`MergeSettings`."""
        if config["tallrec_form"] == "yes_no":
            raise ValueError("tallrec_form: yes_no is a form of TALLRec alone; models that merge adapters need listwise")
        folds = config["merge_full_model"] is not None
        builder = lru_cache(maxsize=2)(parts.builder)  # a plan's tokenizer, and that of the run
        own, others = MergeSettings.of(config), MergeSettings.beside(config)
        methods = [settings.method for settings in (own, *others.values())]
        for option in ("weights", "density", "residual"):
            key, readers = f"merge_{option}", READERS[option]
            given = config[key] != config.internal_config_dict.get(key)
            if given and all(method in BUILTIN and method not in readers for method in methods):
                raise ValueError(f"{key}: {config[key]} has no effect with merge: {own.method}; read by {', '.join(readers)}")
        return cls(parts, own, others, shape, builder, folds)

    @property
    def decoded_titles(self) -> int:
        """Titles in an answer that is decoded for the entropy of its first tokens (``merge_titles``); 0 for a single one."""
        return max((settings.titles for settings in (self.settings, *self.others.values()) if settings.titles > 1), default=0)

    def stages(self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet]) -> dict[str, Stage]:
        """The stage of the model's mixture, ``merged``, and those of ``merge_beside`` by the names of their rows.

        Raises:
            ValueError: the mixture is to be folded into the weights, and cannot be; or as :meth:`stage`.
        """
        if self.folds:
            modules = [module for adapter in sources for module in self.shape(adapter).modules]
            check_foldable(blank_model(self.parts.backbone.outline.config), modules, "merge_full_model")
        found = {"merged": self.stage(name, sources, candidates)}
        for row, settings in self.others.items():
            found[row] = replace(self, settings=settings).stage(name, sources, candidates, row)
        return found

    def lattice(self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet]) -> Stage:
        """The stage of the scores that all rules read, and the report; arguments as of :meth:`stage`."""
        points = int(self.settings.options["points"])
        return LatticeScores(self.parts, points, self.shape, self.builder).stage(name, sources, candidates)

    def stage(
        self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet], row: str | None = None
    ) -> Stage:
        """A stage that writes the merged adapter of ``sources``, by their names in the report, into the folder ``merged``.

        Args:
            name: of the model's merge.
            row: of ``merge_beside``; None: the model's own.

        Raises:
            ValueError: ``merge_split`` names a phase without candidates, or ``merge_weights`` or the method do not fit the
                adapters.
        """
        if resolve(self.settings.method) is methods.factors:
            self._check_alike(list(sources))
        if self.settings.method == "fixed" or self.settings.options["weights"] is not None:
            given_weights(MergeProblem(list(sources), [], settings=dict(self.settings.options)))
        settings, valid = self.settings, self.parts.eval_users(candidates)
        if settings.split not in candidates:
            raise ValueError(f"merge_split: {settings.split} is not one of {', '.join(candidates)}")
        unlabelled = self.parts.eval_users(candidates, settings.split)
        depends = {
            "settings": settings.as_dict(),
            # the source, since the method may be a function of the user
            "method": inspect.getsource(sys.modules[resolve(settings.method).__module__]),
            "prompts": [unlabelled.fingerprint, valid.fingerprint],
            "scores": self.parts.scores_depend_on(),
        }

        reads_lattice = resolve(settings.method).__module__ == rules.__name__
        lattice = self.lattice(name, sources, candidates) if reads_lattice else None

        def build(work: Work) -> None:
            self._merge(sources, lattice, unlabelled, valid, work)

        def cost() -> Cost:
            return self._cost(list(sources), unlabelled, valid, reads_lattice=reads_lattice)

        own = name if row is None else "-".join((name, re.sub(r"\W+", "-", row)[:80]))
        inputs = *sources.values(), *([lattice] if lattice else [])
        return Stage(own, depends, build, inputs, cost=cost, role=row or "")

    def _check_alike(self, names: Sequence[str]) -> None:
        """Refuse, before the others are trained, a given adapter whose factors cannot be added to theirs."""
        first, *others = [(shape.r, sorted(shape.modules)) for shape in map(self.shape, names)]
        for name, (rank, modules) in zip(names[1:], others, strict=True):
            if (rank, modules) != first:
                raise ValueError(
                    f"merge: factors needs equal ranks and target modules, but {names[0]!r} has rank {first[0]} in "
                    f"{len(first[1])} modules, and {name!r} rank {rank} in {len(modules)}; use 'uniform' or 'fixed', or give the "
                    "run r and target_modules of the given adapter"
                )

    def _merge(
        self, sources: Mapping[str, Stage], lattice: Stage | None, unlabelled: EvalUsers, valid: EvalUsers, work: Work
    ) -> None:
        folders = {name: work.folder(stage) for name, stage in sources.items()}
        causal, settings = self.parts.backbone.load(work), self.settings
        with adapters_loaded(causal.model, folders) as model:
            names, modules = list(folders), list(lora_modules(model))
            problem = self.problem(causal, names, modules, partial(AdapterView, model), unlabelled, valid)
            if lattice is not None:
                problem = replace(problem, lattice_scores=read_scores(work, lattice))
            out, rank = work.out / "merged", settings.compress_rank
            merge_adapters(folders, settings.method, problem, out, split=settings.split, compress_rank=rank)

    def _cost(self, names: list[str], unlabelled: EvalUsers, valid: EvalUsers, *, reads_lattice: bool) -> Cost:
        """The cost of the stage: the method runs on a blank LM, whose entropy is 0 at all weights and whose answers never end."""
        outline, shapes = self.parts.backbone.outline, [self.shape(name) for name in names]
        modules, causal = list(dict.fromkeys(module for shape in shapes for module in shape.modules)), blank(outline)
        at = partial(blank_view, causal.model)
        problem = self.problem(causal, names, modules, at, unlabelled, valid, compute=remembered, ends=False)
        if reads_lattice:
            problem = with_blank_lattice(problem)
        method = resolve(self.settings.method)
        # its prompts are those of the controls
        needs_adapters = method.__module__ not in (coefficients.__name__, rules.__name__)
        run = coefficients.controls if needs_adapters else method
        return merge_cost(outline, lambda: run(problem), shapes, at_most=bool(self.settings.first_tokens))

    def counted(self, likelihood: TitleLikelihood) -> Counted:
        """The first answer tokens whose entropy is measured: ``merge_first_tokens`` (or 3) of each of ``merge_titles``."""
        titles, prompts = self.settings.titles, likelihood.prompts
        after = prompts.end if prompts.is_continuation else prompts.gap  # a title of the answer
        return Counted(self.settings.first_tokens or 3, titles, tuple(after), prompts.decoded(titles))

    def problem(
        self,
        causal: CausalLM,
        names: list[str],
        modules: list[str],
        at: Callable[..., Any],
        unlabelled: EvalUsers,
        valid: EvalUsers,
        *,
        compute: Compute = lambda term: term,
        ends: bool = True,
    ) -> MergeProblem:
        """The input of the method, without the targets of the unlabelled prompts.

        Args:
            at: the LM with coefficients as :meth:`MergeProblem.by_name` gives them, as :class:`AdapterView`.
            compute: wraps the functions of weights that the method evaluates.
            ends: an end token ends an answer.
        """
        likelihood = self.parts.likelihood(causal, self.builder(causal.tokenizer))
        counted = self.counted(likelihood) if self.settings.first_tokens else None
        end = causal.tokenizer.eos_token_id if ends else None
        drawn = unlabelled.draw(self.settings.prompts)
        pairs = list(zip(drawn.histories, drawn.candidates, strict=True))
        by_name: Callable[[Tensor], Any] = MergeProblem(names, modules, self.settings.granularity).by_name

        def entropy(weights: Tensor, batch: list[tuple[list[int], Tensor]]) -> Tensor:
            """Mean entropy (nats) of a batch at weights [K] or [M, K]."""
            histories, candidates = [history for history, _ in batch], torch.stack([row for _, row in batch])  # [B, C]
            view = at(by_name(weights))
            if counted is None:
                return candidate_entropy(likelihood.with_lm(view)(histories, candidates))
            texts = [prompt.ids for prompt in likelihood.prompts_of(histories, candidates)]
            return first_tokens_entropy(view, texts, counted, causal.pad_token_id, end)

        def valid_score(weights: Tensor) -> float:
            """Labelled validation score at weights [K] or [M, K], by which learning rates are compared."""
            return valid.score(likelihood.with_lm(at(by_name(weights))))

        # the graphs of a batch are alive at once: of a large LM, a batch is one prompt
        prompts, answers = likelihood.tokens(drawn.histories, drawn.candidates)
        if counted is not None:
            answers = [counted.longest] * len(prompts)
        budgets = gradient_batch_tokens(causal), likelihood.scorer.batch_tokens
        known, metric = valid.draw(self.parts.validation.users), self.parts.validation.metric
        labelled = LabelledUsers(known, metric, likelihood, lambda w: at(by_name(w), fold=True), budgets[0], compute)
        batches, measured = ([[pairs[i] for i in rows] for rows in token_batches(prompts, answers, budget)] for budget in budgets)
        return MergeProblem(
            names=names,
            modules=modules,
            granularity=self.settings.granularity,
            objective=mean_over_batches(compute(entropy), batches, measured=measured, scale=loss_scale(causal.model)),
            valid_score=compute(valid_score),
            labelled=labelled,
            settings=dict(self.settings.options),
        )


def blank_view(lm: Any, coefficients: Any, *, fold: bool = False) -> Any:
    """A blank LM at any coefficients."""
    return lm


def with_blank_lattice(problem: MergeProblem) -> MergeProblem:
    """A problem on a blank LM, whose scores at the points of the lattice are known and 0."""
    labelled = problem.labelled
    assert isinstance(labelled, LabelledUsers)
    return replace(problem, lattice_scores=torch.zeros(len(lattice_points(problem)), *labelled.candidates.shape))
