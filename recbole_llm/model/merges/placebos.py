"""Placebo rows of models that merge adapters: the target's adapter, merged with something in place of every other one.

A merge can be better than the target's adapter without anything that the other adapter has learnt: because weights that sum to
1 shrink the target's update, because noise of that size helps, or because any training on such texts does. Each kind of
placebo removes more of the adapter that it replaces:

- ``shuffled``: an adapter trained with the same settings on the same texts and numbers, without co-occurrence and order
  (:mod:`recbole_llm.data.shuffling`);
- ``random``: Gaussian factors, with the norm of the update in each module;
- ``zero``: no update, so that the target's adapter has a smaller weight, and that is all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.data.shuffling import shuffled
from recbole_llm.llm.adapter_folders import read_adapter
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.random_lora import random_like, write, zero_like
from recbole_llm.merging.stage import merge_adapters
from recbole_llm.store.costs import Cost
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.model.adapters import AdapterSpec, AdapterTraining
    from recbole_llm.model.given_adapters import GivenAdapters
    from recbole_llm.model.merges.stages import AdapterMerging

LABELS = {"shuffled": "shuffled domain", "random": "random LoRA", "zero": "zero LoRA"}


@dataclass(frozen=True)
class Placebos:
    """The rows that the key ``placebos`` asks for.

    Attributes:
        kinds: some of :data:`LABELS`.
    """

    kinds: Sequence[str]
    training: AdapterTraining
    given: GivenAdapters
    merging: AdapterMerging

    def stages(
        self,
        name: str,
        sources: Mapping[str, Stage],
        specs: Mapping[str, AdapterSpec],
        candidates: Mapping[str, CandidateSet],
        *,
        target: str,
    ) -> dict[str, Stage]:
        """The stages of the rows by their names, each with the merged adapter in its folder ``merged``.

        Args:
            name: of the stage of the model's mixture.
            sources: the adapters that the model merges.
            specs: what each of them is trained on.
            target: the adapter that stays.

        Raises:
            ValueError: no adapter stays or none is replaced, a shuffled one is given and not trained, or the name of a row is
                taken.
        """
        others = [other for other in sources if other != target]
        if self.kinds and (target not in sources or not others):
            raise ValueError(
                f"placebos: {name} merges {', '.join(map(repr, sources))}, but placebos need {target!r}, which stays, and one "
                "in whose place they are merged; give placebos: []"
            )
        found = {}
        for kind in dict.fromkeys(self.kinds):
            row, names = f"placebo: {LABELS[kind]}", {other: f"{LABELS[kind]} for {other}" for other in others}
            stages = {names[other]: self._stage(kind, i, other, sources, specs[other]) for i, other in enumerate(others)}
            merged = {names.get(source, source): stages.get(names.get(source, ""), sources[source]) for source in sources}
            merging = self._merging(names)
            found[row] = merging.stage(f"{name}-placebo-{kind}", merged, candidates)
            if merging.settings.method != "uniform":
                found[f"{row}, uniform"] = _uniform(f"{name}-placebo-{kind}-uniform", merged)
        if taken := found.keys() & {*self.merging.others}:
            raise ValueError(f"merge_beside: {min(taken)!r} is the name of a row of placebos; choose another name")
        return found

    def _merging(self, names: Mapping[str, str]) -> AdapterMerging:
        """The model's merging, with adapters under the names of their placebos."""
        settings, shape, before = self.merging.settings, self.merging.shape, {new: old for old, new in names.items()}
        if isinstance(weights := settings.options["weights"], Mapping):
            renamed = {names.get(adapter, adapter): weight for adapter, weight in weights.items()}
            settings = replace(settings, options={**settings.options, "weights": renamed})
        return replace(self.merging, settings=settings, shape=lambda name: shape(before.get(name, name)))

    def _stage(self, kind: str, place: int, other: str, sources: Mapping[str, Stage], spec: AdapterSpec) -> Stage:
        """The stage of a placebo of one adapter."""
        if kind != "shuffled":
            return _untrained(kind, [self.training.parts.seed, place], other, sources[other])
        if other in self.given.given:
            raise ValueError(
                f"placebos: shuffled is trained on the shuffled data of {other!r}, but adapters gives that adapter without its "
                f"data; leave shuffled out, or let this run train {other!r}"
            )
        parts = self.training.parts
        domains = [d if d.name == parts.domain.name else shuffled(d, parts.seed) for d in spec.sources]
        return self.training.stage(replace(spec, name=f"{spec.name}-shuffled", sources=domains))


def _untrained(kind: str, seed: Sequence[int], other: str, source: Stage) -> Stage:
    """A stage that writes a random or zero adapter of the shape of another stage's."""

    def build(work: Work) -> None:
        adapter = read_adapter(work.folder(source), other)
        write(random_like(adapter, np.random.default_rng(seed)) if kind == "random" else zero_like(adapter), work.out)

    slug = re.sub(r"\W+", "-", other)[:80]
    return _cheap(f"{kind}-lora-{slug}", {"seed": seed} if kind == "random" else {}, build, [source], "random_lora")


def _uniform(name: str, sources: Mapping[str, Stage]) -> Stage:
    """A stage that writes the uniform mixture of adapters, without a measurement."""

    def build(work: Work) -> None:
        folders = {adapter: work.folder(stage) for adapter, stage in sources.items()}
        merge_adapters(folders, "uniform", MergeProblem(list(folders), []), work.out / "merged", split=None)

    return _cheap(name, {}, build, [*sources.values()], "stage")


def _cheap(name: str, depends: Mapping[str, object], build: Callable[[Work], None], inputs: Sequence[Stage], code: str) -> Stage:
    """A stage that runs no model; ``code`` is the module of merging that computes it."""
    cost, computes = Cost(note="nothing is trained"), (f"recbole_llm.merging.{code}",)
    return Stage(name, depends, build, tuple(inputs), computes, with_imports=False, cost=lambda: cost)
