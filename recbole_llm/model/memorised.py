"""The stage that measures what the LM of a ranker knows of the catalogue, see :mod:`recbole_llm.llm.memorisation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from recbole_llm.costs.parts import blank, scoring_cost
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.memorisation import Catalogue, memorisation
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.costs import Cost
from recbole_llm.store.stages import Folders, Stage, Work

FILE = "memorisation.json"
_LINES = {
    "titles": "real titles are more likely than titles of other words in {share:.3f} ±{half_width_95:.3f} of {number} pairs",
    "lines": "the next line of the .item file is the most likely one in {share:.3f} ±{half_width_95:.3f} of {number} cases, by "
    "shared words in {words:.3f}",
}


class Memorised:
    """What the LM of a ranker knows of its catalogue, if that is ``wanted``.

    Attributes:
        stages: the stage that measures it, which depends on the backbone and the catalogue and on no training data.
        found: the measurements, once they are loaded.
    """

    def __init__(self, parts: RankerParts, wanted: bool):
        self.stages: Sequence[Stage] = (_stage(parts),) if wanted else ()
        self.found: Mapping[str, Any] | None = None

    def load(self, results: Folders) -> None:
        """Read the result of the stage."""
        for stage in self.stages:
            self.found = json.loads((results.folder(stage) / FILE).read_text())

    def lines(self) -> list[str]:
        """The measurements for the log."""
        return [
            f"memorisation: {_LINES[name].format(**part)} (chance {part['chance']:g})"
            for name, part in (self.found or {}).items()
            if part is not None
        ]


def _stage(parts: RankerParts) -> Stage:
    domain, backbone = parts.domain, parts.backbone
    catalogue = Catalogue(domain.noun, domain.items.names, domain.items.lines, parts.prompts.max_title_tokens)

    @torch.no_grad()
    def measured(causal: CausalLM) -> dict[str, Any]:
        scorer = parts.scorer(causal, "prefix" if parts.scoring.reads_labels else None)
        return memorisation(causal, scorer, catalogue, parts.seed)

    def build(work: Work) -> None:
        (work.out / FILE).write_text(json.dumps(measured(backbone.load(work)), indent=1))

    def cost() -> Cost:
        outline = backbone.outline
        return scoring_cost(outline, [(measured, 1)], [blank(outline)], users=0)

    depends = {"backbone": backbone.fingerprint, "catalogue": asdict(catalogue), "seed": parts.seed}
    return Stage("memorisation", depends, build, inputs=backbone.stages, cost=cost)
