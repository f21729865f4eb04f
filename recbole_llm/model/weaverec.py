"""WeaveRec: a target LoRA merged with hybrid LoRAs, each trained on the target and one source domain.

"WeaveRec: An LLM-Based Cross-Domain Sequential Recommendation Framework with Model Merging" (arXiv 2510.26546). N source domains
D_i support a target D_0; the domains need not share users or items. All LoRAs start from the same pre-trained LM:

1. target only: a LoRA theta_0 on D_0;
2. hybrids: for each source a LoRA theta_i on D_0 and D_i (up to ``weave_samples`` training examples of each);
3. weave: theta_0 and all theta_i are merged into one adapter, uniformly in the paper.

A LoRA of a source domain performs badly on the target, and so does a merge that contains it; hence the hybrids. The hybrid of
(Beauty, Toys) is the same for both targets, so K domains need K + K (K - 1) / 2 adapters for all K targets.

``weave`` also names the paper's baselines: ``target_only`` (theta_0), ``data_merging`` (one LoRA on all domains) and
``naive_merging`` (one LoRA for each domain, merged). ``weave_controls`` are trained and evaluated beside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import Domain
from recbole_llm.evaluation.published import WEAVEREC
from recbole_llm.model import assembly
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.merges.rows import MergeRows
from recbole_llm.model.merges.stages import AdapterMerging
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.stages import Stage

logger = getLogger()

SCHEMES = {
    "hybrid": "hybrid merging",
    "target_only": "target only",
    "data_merging": "data merging",
    "naive_merging": "naive merging",
}


class WeaveRec(LLMRanker):
    """Target-only LoRA + one hybrid LoRA for each source, merged."""

    published = WEAVEREC
    merge_rows: MergeRows

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.merging = AdapterMerging.of(config, self.parts, self.shape)
        self.decoded_titles = self.merging.decoded_titles
        self.merge_rows = MergeRows("weave", config, self.merging, self.adapter_training, self.given)
        if self.adapter_training.config.valid != "loss":
            logger.warning("lora_valid: ranking changes nothing for WeaveRec, whose adapters are chosen by the held-out loss")
        self.scheme, self.most = config["weave"], config["weave_samples"]
        self.controls = [scheme for scheme in config["weave_controls"] if scheme != self.scheme]
        for key, names in (("weave", [self.scheme]), ("weave_controls", self.controls)):
            if unknown := [name for name in names if name not in SCHEMES]:
                raise ValueError(f"{key}: {unknown[0]} is not one of {', '.join(SCHEMES)}")

    def assembled(self, config: Any, dataset: Any) -> RankerParts:
        parts = super().assembled(config, dataset)
        self.others = domains.named_or_views("source_datasets", config, (parts.domain, parts.histories))
        if not config["source_datasets"]:
            return parts  # views of the target add nothing to the builtin LM, which is trained on all other domains
        return replace(parts, backbone=assembly.backbone(config, _in_order([parts.domain, *self.others])))

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        return {name: spec for scheme in (self.scheme, *self.controls) for name, spec in self._specs(scheme).items()}

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        stages, specs = self.adapter_stages(candidates), self._specs(self.scheme)
        sources = {name: stages[name] for name in specs}
        self.check_rows("merge_beside", self.merging.others)
        self.merge_rows.plan(sources, specs, candidates, target=SCHEMES["target_only"])
        self.measures_merges = self.merge_rows.report
        count = 1 + len(self.others)
        logger.info(
            f"weave of {count} domains: with all of them as targets, there are {count} single-domain and "
            f"{count * (count - 1) // 2} hybrid adapters; this run and its controls use {len(stages)}"
        )
        return [*self.merge_rows.stages.values(), *stages.values(), *self.other_stages()]

    def _specs(self, scheme: str) -> dict[str, AdapterSpec]:
        """The adapters that a scheme merges, by name; the target's is the first.

        Raises:
            ValueError: the names of two domains give two adapters one name.
        """
        target = self.parts.domain
        if scheme == "data_merging":
            return {SCHEMES[scheme]: self._lora([target, *self.others])}
        found = {SCHEMES["target_only"]: self._lora([target])}
        if scheme == "hybrid":
            found |= {f"hybrid {_plain(other)}": self._lora([target, other]) for other in self.others}
        if scheme == "naive_merging":
            found |= {f"{_plain(other)} only": self._lora([other]) for other in self.others}
        if scheme != "target_only" and len(found) <= len(self.others):
            raise ValueError(
                f"source_datasets: {', '.join(other.name for other in self.others)} give two adapters of {SCHEMES[scheme]} "
                f"one name, of {', '.join(found)}; rename a dataset (dots and slashes do not count)"
            )
        return found

    def _lora(self, mixture: Iterable[Domain]) -> AdapterSpec:
        """An adapter that depends only on its domains, not on which of them is the target."""
        ordered = _in_order(mixture)
        name = "lora-" + "+".join(map(_plain, ordered))
        return AdapterSpec(name[:120], ordered, of_each=True, most=self.most if len(ordered) > 1 else None)

    def mixtures(self) -> dict[str, list[str]]:
        controls = {SCHEMES[scheme]: list(self._specs(scheme)) for scheme in self.controls}
        found = {name: adapters for name, adapters in controls.items() if len(adapters) > 1}
        if self.merging.settings.method != "uniform":  # otherwise it is the model's own row
            found["uniform mix"] = list(self._specs(self.scheme))
        return found


def _in_order(mixture: Iterable[Domain]) -> list[Domain]:
    return sorted(mixture, key=lambda domain: domain.name)


def _plain(domain: Domain) -> str:
    """A domain's name without dots and slashes, which names of folders and of peft's modules must not contain."""
    return domain.name.replace(".", "_").replace("/", "-")
