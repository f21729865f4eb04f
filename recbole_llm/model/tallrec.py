"""TALLRec: one LoRA on the target domain, list-wise as in the papers that compare with it, or with its own Yes/No question.

Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with Recommendation", RecSys
2023 (arXiv 2305.00447). RecCocktail and A-LLMRec train its LoRA on their own list-wise prompts and rank by titles, and so does
``tallrec_form: listwise``. The original, ``tallrec_form: yes_no`` (``model/yes_no.py``), asks whether a user likes one item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation.published import RECCOCKTAIL, PublishedProtocol
from recbole_llm.model.adapters import AdapterSpec
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.model.yes_no import YesNoParts, YesNoTraining


class TALLRec(LLMRanker):
    """One LoRA, trained on the target's training split."""

    published: PublishedProtocol | None = RECCOCKTAIL

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        form, parts = config["tallrec_form"], self.parts
        if form not in ("listwise", "yes_no"):
            raise ValueError(f"tallrec_form: {form!r} is neither listwise nor yes_no")
        if form == "yes_no":
            if parts.scoring.reads_labels or parts.examples.whole_histories or parts.scoring.normalize != "sum":
                raise ValueError(
                    "tallrec_form: yes_no needs scorer: tree, prefix or naive, normalize: sum and lora_train_mode: prefix"
                )
            shared = {field.name: getattr(parts, field.name) for field in fields(parts)}
            self.parts = YesNoParts(**shared, train_on_inputs=config["train_on_inputs"])
            self.published = None  # Yes and No have scores
            self.adapter_training = YesNoTraining(self.parts, self.adapter_training.config)
            if tokenizer := self.parts.backbone.tokenizer:
                self.parts.builder(tokenizer)  # raises before training if the prompt does not suit

    def trained(self, candidates: Mapping[str, CandidateSet]) -> dict[str, AdapterSpec]:
        return {"tuned": AdapterSpec("ingredient", [self.parts.domain], self.adapter_training.valid(candidates))}
