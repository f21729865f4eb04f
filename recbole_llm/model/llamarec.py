"""LlamaRec: a retriever and one LoRA that predicts the label of a candidate.

Yue et al., "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking", PGAI@CIKM 2023 (arXiv 2311.02089). A
sequential model retrieves twenty items, and a prompt lists them as A, B, C, ... The *verbalizer* ranks them by the logits of
their labels at one position, in a single forward pass without generation. The LoRA is trained to predict the label of the next
item among sampled negatives. ``retriever`` names the sequential model (LRURec in the paper) of full rankings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import chisquare

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation import plots
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.ranker import LLMRanker

if TYPE_CHECKING:
    from recbole_llm.evaluation.record import Row


class LlamaRec(LLMRanker):
    """One LoRA, trained to predict the label of the next item.

    Attributes:
        labels: see :meth:`findings`.
        listed: the test candidates, each of which has a label; None in a full ranking.
    """

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if not self.parts.scoring.reads_labels:
            raise ValueError(f"scorer: LlamaRec reads the logits of labels, not {config['scorer']}; leave out scorer")
        self.labels: dict[str, dict[str, Any]] = {}
        self.listed: CandidateSet | None = None  # a retriever's are known after its training
        self.candidate_files = config["candidates"]["file"] if config["candidates"]["source"] == "file" else {}

    def _check_labels(self, what: str, candidates: int) -> None:
        labels = len(self.parts.prompts.labels or ())
        if candidates > labels:
            raise ValueError(
                f"{what} lists {candidates} candidates, but with candidates.num_negatives: {labels - 1} prompts have {labels} "
                f"labels; give candidates: {{'num_negatives': {candidates - 1}}}"
            )

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        for phase, file in self.candidate_files.items():
            if phase in candidates:  # a full ranking reads none
                self._check_labels(f"candidates.file: {file}", candidates[phase].items.size(1))
        self.listed = candidates.get("test")
        return {"tuned": AdapterSpec("verbalizer", [self.parts.domain], self.adapter_training.valid(candidates))}

    def findings(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """``labels``: for each row, how many users have each label in the first place, and for how many it is the target's.

        Candidates are listed in a drawn order, so an LM that reads them prefers no label. ``p`` is that of a chi-square test of
        equal shares. Of a full ranking, where a retriever chooses the candidates, there is nothing.
        """
        self.labels = {}
        for row in () if self.reranks else rows:
            names = list(self.parts.prompts.labels or ())[: self.listed.items.size(1) if self.listed else None]
            found = np.isfinite(row.ranks.ranks)  # a target that the retriever has missed has no label
            slots = row.ranks.first, np.array(row.ranks.slots, dtype=int)[found]
            first, target = (np.bincount(part, minlength=len(names)) for part in slots)
            if row.ranks.first:
                p = float(chisquare(first).pvalue)
                self.labels[row.name] = {"labels": names, "first": first.tolist(), "target": target.tolist(), "p": p}
        return {"labels": self.labels} if self.labels else {}

    def report(self, folder: Path) -> list[str]:
        lines = super().report(folder)
        for row, found in self.labels.items():
            most = int(np.argmax(found["first"]))
            share, label = found["first"][most] / sum(found["first"]), found["labels"][most]
            lines.append(
                f"labels: {row} has {label} in the first place for {share:.1%} of the users; equal shares: p {found['p']:.3g}"
            )
        if self.labels:
            bars = {f"first place, {row}": found["first"] for row, found in self.labels.items()}
            labels, target = next((found["labels"], found["target"]) for found in self.labels.values())
            file = folder / "labels.png"
            plots.bars(file, labels, {"target": target, **bars}, title=str(self), row_label="users", column_label="label")
            lines.append(f"labels: {file}")
        return lines
