"""WeaveRec: a target LoRA woven with hybrid LoRAs, each trained on the target together with one source domain.

"WeaveRec: An LLM-Based Cross-Domain Sequential Recommendation Framework with Model Merging" (arXiv 2510.26546). N source domains
D_i help a target D_0; neither users nor items are shared. On one frozen LM, each from the pre-trained weights:

1. target only: a LoRA theta_0 on D_0;
2. hybrids: for each source a LoRA theta_i on D_0 and D_i, one to one (up to ``train_samples`` rows of each);
3. weave: ``theta_0`` and all ``theta_i`` merged, uniformly as published, into one adapter.

A source's own LoRA does badly on the target and would drag a merged model down with it; a hybrid knows both. Hybrids take no
side: the one of (Beauty, Toys) serves either as target, is kept and found again. So K domains need K + K (K - 1) / 2 adapters
for all their targets.

``weave`` also names what the paper argues against: ``target`` (theta_0 alone), ``all`` (data merging: one LoRA on all domains)
and ``single`` (naive model merging: the LoRAs of single domains). ``weave_controls`` are trained and shown beside the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.domains import Domain
from recbole_llm.model.merging_ranker import MergingRanker
from recbole_llm.store.files import is_complete
from recbole_llm.store.stages import Stage

SCHEMES = {"hybrid": "WeaveRec", "target_only": "target only", "data_merging": "data merging", "naive_merging": "naive merging"}


class WeaveRec(MergingRanker):
    """Target-only LoRA + one hybrid LoRA for each source, merged."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.scheme = config["weave"]
        self.shown = [scheme for scheme in config["weave_controls"] if scheme != self.scheme]
        for key, names in (("weave", [self.scheme]), ("weave_controls", self.shown)):
            if unknown := [name for name in names if name not in SCHEMES]:
                raise ValueError(f"{key}: {unknown[0]} is not one of {', '.join(SCHEMES)}")

    def _read_domains(self, config: Any) -> Sequence[Domain]:
        """All of them, in an order that no target decides; views of the target hold nothing that it does not."""
        self.others = domains.named_or_views("source_datasets", config, (self.domain, self.histories))
        return _in_order([self.domain, *self.others]) if config["source_datasets"] else [self.domain]

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        self.controls_by_scheme = {scheme: self._adapters(scheme) for scheme in self.shown}
        own = self._adapters(self.scheme)
        self._tell([own, *self.controls_by_scheme.values()])
        return self.merge_stage("weave", own)

    def finished(self, folder: Path) -> dict[str, Path]:
        found = super().finished(folder)
        for adapters in self.controls_by_scheme.values():
            found |= {name: self.cache.run(stage) for name, stage in adapters.items()}
        return found

    def _adapters(self, scheme: str) -> dict[str, Stage]:
        """The adapters that a scheme merges, by name; the target's own comes first."""
        if scheme == "data_merging":
            return {SCHEMES["data_merging"]: self._lora([self.domain, *self.others])}
        found = {SCHEMES["target_only"]: self._lora([self.domain])}
        if scheme == "hybrid":
            found |= {f"hybrid {_plain(other)}": self._lora([self.domain, other]) for other in self.others}
        if scheme == "naive_merging":
            found |= {f"{_plain(other)} only": self._lora([other]) for other in self.others}
        return found

    def _lora(self, mixture: Iterable[Domain]) -> Stage:
        """An adapter that depends on its domains alone, not on which of them is the target or what it is called here."""
        ordered = _in_order(mixture)
        name = "lora-" + "+".join(map(_plain, ordered))
        return self.lora_stage(name[:120], ordered, stop_on_target=False, of_each=True)

    def _tell(self, schemes: Sequence[dict[str, Stage]]) -> None:
        """How many adapters this run trains, and which of them are there already."""
        stages = {stage.name: stage for adapters in schemes for stage in adapters.values()}
        count = 1 + len(self.others)
        kept = [name for name, stage in stages.items() if is_complete(self.cache.folder(stage))]
        missing = [name for name in stages if name not in kept]
        self.logger.info(
            f"weave of {count} domains: {count} single-domain and {count * (count - 1) // 2} hybrid adapters serve them all as "
            f"targets; this run with its controls uses {len(stages)}. Kept: {', '.join(kept) or 'none'}. "
            f"To be trained: {', '.join(missing) or 'none'}"
        )

    # -- controls ------------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        merged = {SCHEMES[scheme]: adapters for scheme, adapters in self.controls_by_scheme.items() if len(adapters) > 1}
        return {name: partial(self.answer_with_mean, adapters) for name, adapters in merged.items()} | super().controls()


def _in_order(mixture: Iterable[Domain]) -> list[Domain]:
    return sorted(mixture, key=lambda domain: domain.name)


def _plain(domain: Domain) -> str:
    """A domain's name where neither folders nor peft's modules take dots and slashes."""
    return domain.name.replace(".", "_").replace("/", "-")
