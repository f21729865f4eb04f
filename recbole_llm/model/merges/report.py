"""The stage of ``merge_report``: entropy, other criteria and the validation metric along the lattice of weights; for study.

It chooses nothing: the merge does not depend on it.

Legend: K adapters, M adapted modules, N users, P points.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.costs.merging import merge_cost
from recbole_llm.costs.parts import blank, remembered
from recbole_llm.llm.lora import AdapterView, adapters_loaded, lora_modules
from recbole_llm.llm.packing import token_batches
from recbole_llm.merging.calibration import confidence_and_accuracy
from recbole_llm.merging.coefficients import MergeProblem, lattice_points, single_points
from recbole_llm.merging.lattice import Lattice
from recbole_llm.merging.lattice_report import lattice_report
from recbole_llm.merging.objectives import first_tokens_entropies
from recbole_llm.merging.report import REPORT_FILE
from recbole_llm.model.merges.labelled_users import LabelledUsers
from recbole_llm.model.merges.lattice_scores import read_scores
from recbole_llm.model.merges.scored_users import Compute
from recbole_llm.model.merges.stages import AdapterMerging, blank_view, with_blank_lattice
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.store.costs import Cost


@dataclass(frozen=True)
class MergeReport:
    """Measures the merges that ``merging`` chooses from."""

    merging: AdapterMerging

    def stage(self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet]) -> Stage:
        """The stage that measures mixtures of ``sources``, by their names in the report."""
        settings, parts = self.merging.settings, self.merging.parts
        valid = parts.eval_users(candidates)
        depends = {
            "points": settings.options["points"],
            "granularity": settings.granularity,
            "tokens": [settings.first_tokens, settings.titles],
            "users": valid.fingerprint,
            "scores": parts.scores_depend_on(),
            "names": list(sources),
        }

        lattice = self.merging.lattice(name, sources, candidates)

        def build(work: Work) -> None:
            (work.out / REPORT_FILE).write_text(json.dumps(self._built(sources, lattice, valid, work), indent=1))

        inputs = *sources.values(), lattice
        cost = partial(self._cost, list(sources), valid)
        return Stage(f"{name}-report", depends, build, inputs, cost=cost, role="merge_report")

    def _built(self, sources: Mapping[str, Stage], lattice: Stage, valid: EvalUsers, work: Work) -> dict[str, Any]:
        causal = self.merging.parts.backbone.load(work)
        known = partial(replace, lattice_scores=read_scores(work, lattice))
        with adapters_loaded(causal.model, {name: work.folder(stage) for name, stage in sources.items()}) as model:
            return self._measured(causal, list(sources), list(lora_modules(model)), partial(AdapterView, model), valid, known)

    def _cost(self, names: list[str], valid: EvalUsers) -> Cost:
        outline, shapes = self.merging.parts.backbone.outline, [self.merging.shape(name) for name in names]
        modules, causal = list(dict.fromkeys(module for shape in shapes for module in shape.modules)), blank(outline)
        at = partial(blank_view, causal.model)

        def measure() -> dict[str, Any]:
            return self._measured(causal, names, modules, at, valid, with_blank_lattice, remembered, ends=False)

        return merge_cost(outline, measure, shapes, at_most=True)

    @torch.no_grad()
    def _measured(
        self,
        causal: CausalLM,
        names: list[str],
        modules: list[str],
        at: Callable[..., Any],
        valid: EvalUsers,
        known: Callable[[MergeProblem], MergeProblem],
        compute: Compute = lambda run: run,
        *,
        ends: bool = True,
    ) -> dict[str, Any]:
        """The report; ``known`` gives a problem the scores at the lattice, other arguments as :meth:`AdapterMerging.problem`."""
        problem = known(self.merging.problem(causal, names, modules, at, valid, valid, compute=compute, ends=ends))
        labelled = problem.labelled
        assert isinstance(labelled, LabelledUsers)
        tokens = compute(self._first_tokens(causal, labelled, problem, at, ends=ends))
        users = len(labelled)

        def report(points: Sequence[tuple[str, Tensor]], scores: Tensor | None = None) -> tuple[Lattice, dict[str, Any]]:
            found = Lattice.measured(labelled, points, scores)
            criteria = {
                "first_tokens_entropy": torch.stack([tokens(weights).cpu().expand(users) for weights in found.weights]),
                "candidate_entropy": found.entropy(),
                "calibrated_entropy": found.calibrated_entropy(),
                "disagreement": found.disagreement(),
                "cross_entropy": found.cross_entropy(),
            }
            return found, lattice_report(found, criteria, names)

        lattice, over_all = report(lattice_points(replace(problem, granularity="global")), problem.lattice_scores)
        singles = zip(names, lattice.singles, strict=True)
        settings = self.merging.settings
        by_module = None
        if settings.granularity == "module":
            groups = module_groups(len(modules), len(names), int(problem.setting("points", 11)))
            _, by_module = report(module_points(problem, groups))
            by_module["groups"] = [[modules[group[0]], modules[group[-1]]] for group in groups]
        return {
            "metric": self.merging.parts.validation.metric,
            "users": users,
            "first_tokens": settings.first_tokens or 3,
            "titles": settings.titles,
            "adapters": {name: confidence_and_accuracy(lattice.scores[place], lattice.slots) for name, place in singles},
            "lattice": over_all,
            "modules": by_module,
        }

    def _first_tokens(
        self, causal: CausalLM, labelled: LabelledUsers, problem: MergeProblem, at: Callable[..., Any], *, ends: bool
    ) -> Callable[[Tensor], Tensor]:
        """Weights -> entropy ``[N]`` (nats) of each labelled user's first answer tokens."""
        likelihood = labelled.likelihood
        counted, end = self.merging.counted(likelihood), causal.tokenizer.eos_token_id if ends else None
        prompts = [prompt.ids for prompt in likelihood.prompts_of(labelled.histories, labelled.candidates)]
        lengths, answers = [len(prompt) for prompt in prompts], [counted.longest] * len(prompts)
        batches = token_batches(lengths, answers, likelihood.scorer.batch_tokens)
        order = torch.tensor([i for batch in batches for i in batch]).argsort()

        def entropy(weights: Tensor) -> Tensor:
            view = at(problem.by_name(weights), fold=True)
            parts = (
                first_tokens_entropies(view, [prompts[i] for i in batch], counted, causal.pad_token_id, end) for batch in batches
            )
            return torch.cat([part.cpu() for part in parts])[order]

        return entropy


def module_groups(modules: int, adapters: int, most: int) -> list[list[int]]:
    """Consecutive modules in groups of almost equal sizes, so that :func:`module_points` are at most ``most``, or one group."""
    count = min(modules, max(1, (most - 1 - adapters) // adapters))
    return [list(range(i * modules // count, (i + 1) * modules // count)) for i in range(count)]


def module_points(problem: MergeProblem, groups: Sequence[Sequence[int]]) -> list[tuple[str, Tensor]]:
    """The controls, then each group of modules in turn with each single adapter, and equal weights elsewhere."""
    controls = single_points(problem)
    uniform, points = controls[0][1], list(controls)  # [M, K]
    for group in groups:
        for corner in torch.eye(len(problem.names)):
            weights = uniform.clone()
            weights[list(group)] = corner
            points.append(("modules", weights))
    return points
