"""WeaveRec: a target LoRA woven with hybrid LoRAs, each trained on the target together with one source domain.

"WeaveRec: An LLM-Based Cross-Domain Sequential Recommendation Framework with Model Merging" (arXiv 2510.26546). N source domains
D_i help a target D_0; neither users nor items are shared. On one frozen LM, each from the pre-trained weights:

1. target only: a LoRA theta_0 on D_0;
2. hybrids: for each source a LoRA theta_i on D_0 and D_i, one to one (up to ``train_samples`` rows of each);
3. weave: ``theta_0`` and all ``theta_i`` merged, uniformly as published, into one adapter.

The LoRA of a source alone performs badly on the target, and so does what it is merged into; a hybrid is trained on both. The
hybrid of (Beauty, Toys) serves either as target and is reused. So K domains need K + K (K - 1) / 2 adapters for all their
targets.

``weave`` also names what the paper compares with: ``target_only`` (theta_0 alone), ``data_merging`` (one LoRA on all domains)
and ``naive_merging`` (the LoRAs of single domains). ``weave_controls`` are trained and shown beside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import Domain
from recbole_llm.evaluation.recommender import Facts
from recbole_llm.model import assembly
from recbole_llm.model.adapters import AdapterTraining
from recbole_llm.model.merged import AdapterMerging, MergeSettings
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Folders, Stage, StageCache

logger = getLogger()

SCHEMES = {
    "hybrid": "WeaveRec",
    "target_only": "target only",
    "data_merging": "data merging",
    "naive_merging": "naive merging",
}


class WeaveRec(LLMRanker):
    """Target-only LoRA + one hybrid LoRA for each source, merged."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.others = domains.named_or_views("source_datasets", config, (self.parts.domain, self.parts.histories))
        if config["source_datasets"]:  # the builtin LM reads all domains; views of the target hold nothing that it does not
            backbone = assembly.backbone(config, _in_order([self.parts.domain, *self.others]))
            self.parts = replace(self.parts, backbone=backbone)
            self.adapter_training = AdapterTraining(self.parts, self.adapter_training.config)
        self.merging = AdapterMerging(self.parts, MergeSettings.of(config))
        self.merge_report: Mapping[str, Any] = {}
        self.scheme = config["weave"]
        self.controls = [scheme for scheme in config["weave_controls"] if scheme != self.scheme]
        for key, names in (("weave", [self.scheme]), ("weave_controls", self.controls)):
            if unknown := [name for name in names if name not in SCHEMES]:
                raise ValueError(f"{key}: {unknown[0]} is not one of {', '.join(SCHEMES)}")

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        self.schemes = {scheme: self._adapters(scheme) for scheme in (self.scheme, *self.controls)}
        self.stages = {name: stage for adapters in self.schemes.values() for name, stage in adapters.items()}
        self.weave = self.merging.stage("weave", self.schemes[self.scheme], candidates)
        count = 1 + len(self.others)
        logger.info(
            f"weave of {count} domains: {count} single-domain and {count * (count - 1) // 2} hybrid adapters serve all of them "
            f"as targets; this run and its controls use {len(self.stages)}"
        )
        return [self.weave, *self.stages.values(), *self.retrieval()]

    def _adapters(self, scheme: str) -> dict[str, Stage]:
        """The adapters that a scheme merges, by name; the target's own comes first."""
        target = self.parts.domain
        if scheme == "data_merging":
            return {SCHEMES[scheme]: self._lora([target, *self.others])}
        found = {SCHEMES["target_only"]: self._lora([target])}
        if scheme == "hybrid":
            found |= {f"hybrid {_plain(other)}": self._lora([target, other]) for other in self.others}
        if scheme == "naive_merging":
            found |= {f"{_plain(other)} only": self._lora([other]) for other in self.others}
        return found

    def _lora(self, mixture: Iterable[Domain]) -> Stage:
        """An adapter that depends on its domains alone, not on which of them is the target or what it is called here."""
        ordered = _in_order(mixture)
        name = "lora-" + "+".join(map(_plain, ordered))
        return self.adapter_training.stage(name[:120], ordered, of_each=True)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def adapters(self, results: Folders) -> dict[str, Path]:
        merged = {"merged": self.merging.folder(results, self.weave)}
        return merged | {name: results.folder(stage) for name, stage in self.stages.items()}

    def mixtures(self) -> dict[str, list[str]]:
        found = {SCHEMES[scheme]: list(self.schemes[scheme]) for scheme in self.controls if len(self.schemes[scheme]) > 1}
        if self.merging.settings.method != "uniform":  # else it would repeat the model's own row
            found["uniform mix"] = list(self.schemes[self.scheme])
        return found

    def load(self, cache: StageCache) -> None:
        super().load(cache)
        self.merge_report = self.merging.report(self.merging.folder(cache, self.weave))

    def facts(self) -> Facts:
        return replace(super().facts(), merge=self.merge_report)

    def report(self, folder: Path) -> list[str]:
        return self.merging.draw(folder, self.merge_report)


def _in_order(mixture: Iterable[Domain]) -> list[Domain]:
    return sorted(mixture, key=lambda domain: domain.name)


def _plain(domain: Domain) -> str:
    """A domain's name where neither folders nor peft's modules take dots and slashes."""
    return domain.name.replace(".", "_").replace("/", "-")
