"""The stage that scores the labelled validation users at the points of the lattice, once for all that reads it.

These scores are the most expensive part of most merges, and the same for each rule of :mod:`recbole_llm.merging.rules`, for
``merge_report`` and for later runs with other rules. So neither a rule nor its settings determine the stage, and its code
imports none.

Legend: K adapters, N users, C candidates, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.costs.lora import AdapterShape
from recbole_llm.costs.merging import merge_cost
from recbole_llm.costs.parts import blank, remembered
from recbole_llm.llm.lora import AdapterView, adapters_loaded
from recbole_llm.merging.points import points_of_lattice
from recbole_llm.model.merges.scored_users import Compute, ScoredUsers
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.files import save_tensors
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.prompts import PromptBuilder
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.store.costs import Cost

SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True)
class LatticeScores:
    """Scores at the points of the lattice.

    Attributes:
        points: of the lattice at most (``merge_points``).
        shape: that of the adapter of a name.
        builder: the prompts for a tokenizer.
    """

    parts: RankerParts
    points: int
    shape: Callable[[str], AdapterShape]
    builder: Callable[[Any], PromptBuilder]

    def stage(self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet]) -> Stage:
        """The stage that scores mixtures of ``sources``; ``name`` is that of the model's merge, whatever row reads it.

        The names of the adapters are no part of it, but their order is, which ``inputs`` have.
        """
        valid = self.parts.eval_users(candidates)
        depends = {"points": self.points, "users": valid.fingerprint, "scores": self.parts.scores_depend_on()}

        def build(work: Work) -> None:
            save_tensors(work.out / SCORES_FILE, {"scores": self._scores(sources, valid, work)})

        stages = tuple(sources.values())
        return Stage(f"{name}-lattice-{self.points}", depends, build, stages, cost=lambda: self._cost(list(sources), valid))

    def _scores(self, sources: Mapping[str, Stage], valid: EvalUsers, work: Work) -> Tensor:
        """``[P, N, C]``."""
        causal = self.parts.backbone.load(work)
        with adapters_loaded(causal.model, {name: work.folder(stage) for name, stage in sources.items()}) as model:

            def at(weights: Tensor) -> AdapterView:
                return AdapterView(model, dict(zip(sources, weights.unbind(), strict=True)), fold=True)

            return self._measured(causal, len(sources), at, valid)

    def _cost(self, names: list[str], valid: EvalUsers) -> Cost:
        outline, shapes = self.parts.backbone.outline, [self.shape(name) for name in names]
        causal = blank(outline)

        def measure() -> Tensor:
            return self._measured(causal, len(names), lambda _: causal.model, valid, remembered)

        return merge_cost(outline, measure, shapes, at_most=False)

    def _measured(
        self,
        causal: CausalLM,
        count: int,
        at: Callable[[Tensor], Any],
        valid: EvalUsers,
        compute: Compute = lambda run: run,
    ) -> Tensor:
        """Scores ``[P, N, C]`` of ``count`` adapters; arguments as of :class:`ScoredUsers`."""
        likelihood = self.parts.likelihood(causal, self.builder(causal.tokenizer))
        users = ScoredUsers(valid.draw(self.parts.validation.users), likelihood, at, compute)
        return torch.stack([users.scores(weights) for _, weights in points_of_lattice(count, self.points)])


def read_scores(work: Work, stage: Stage) -> Tensor:
    """``[P, N, C]`` of :func:`~recbole_llm.merging.points.points_of_lattice`, as an earlier stage wrote them."""
    return load_file(work.folder(stage) / SCORES_FILE)["scores"]
