"""Builds the parts of models from a configuration and a RecBole dataset, without loading a backbone or training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recbole_llm.costs.builtin import builtin_cost
from recbole_llm.data import domains, forms
from recbole_llm.data.domains import Domain
from recbole_llm.data.examples import ExampleSettings
from recbole_llm.data.templates import PromptSettings, template
from recbole_llm.evaluation.metrics import check_valid_metric
from recbole_llm.llm.backbones import BUILTIN, Backbone, BackboneSettings
from recbole_llm.llm.builtin_lm import builtin_stage, untrained
from recbole_llm.llm.checks import BackboneCheck
from recbole_llm.model.parts import Parts, Validation
from recbole_llm.model.ranker_parts import RankerParts, ScoringSettings
from recbole_llm.training.loop import LoopOptions

LABELS = (*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",)


def backbone(config: Any, sources: Sequence[Domain], *, encodes: bool = False, vectors: bool = False) -> Backbone:
    """The LM that ``config`` names; the builtin LM is trained on ``sources``, or reused from the run that ``init_from`` names.

    encodes: its hidden states are read, not its scores. vectors: its prompts have soft tokens.

    Raises:
        FileNotFoundError, ValueError: there is no such LM, or the other run has none.
    """
    settings = BackboneSettings.of(config)
    check = BackboneCheck.of(config, vectors=vectors, **{"scorer": None} if encodes else {})
    if settings.path != BUILTIN:
        return Backbone(settings, check=check)
    if config.init_run:
        return Backbone(settings, folder=config.init_run.stage("builtin-lm"), check=check)
    own, seed = config["builtin_lm"], config["seed"]
    stage = builtin_stage(own, sources, seed, LoopOptions.of(config))
    stage = replace(stage, cost=lambda: builtin_cost(found.outline, own, sources, seed))
    found = Backbone(settings, stage, check=check, untrained=lambda: untrained(own, sources))
    return found


def encoder_parts(config: Any, dataset: Any, prompts: PromptSettings) -> Parts:
    """The parts of an encoder.

    Raises:
        ValueError: ``valid_metric`` is not a function of the target's rank.
    """
    return Parts(**_shared(config, dataset, prompts, encodes=True))


def ranker_parts(config: Any, dataset: Any, *, vectors: bool = False) -> RankerParts:
    """The parts of a ranker, whose prompts may have soft tokens (``vectors``); raises as :func:`encoder_parts`."""
    scoring, examples = ScoringSettings.of(config), ExampleSettings.of(config)
    if scoring.scorer == "tree" and config["attn_implementation"] not in (None, "sdpa", "eager"):
        raise ValueError(
            f"scorer: tree needs attn_implementation: sdpa or eager, not {config['attn_implementation']}, which takes no mask of "
            "its own; give --scorer=prefix or --attn_implementation=sdpa"
        )
    labelled: dict[str, Any] = {}
    if scoring.reads_labels:
        listed = {"candidates.num_negatives": examples.num_negatives + 1}
        if "test" not in config["candidate_phases"]:  # the top of a retriever is re-ranked
            listed["retriever_top"] = config["retriever_top"]
        for key, number in listed.items():
            if number > len(LABELS):
                raise ValueError(
                    f"{key}: prompts list {number} candidates, but scorer: label has {len(LABELS)} labels (A to Z, a to z); "
                    f"lower it by {number - len(LABELS)}, or choose a model that scores titles, such as TALLRec"
                )
        labelled = {"template": template(config, config["labelled_prompt"]), "labels": LABELS[: max(listed.values())]}
    shared = _shared(config, dataset, PromptSettings.of(config, **labelled), vectors=vectors)
    return RankerParts(**shared, scoring=scoring, examples=examples, form=forms.described(config))


def _shared(config: Any, dataset: Any, prompts: PromptSettings, **reads: bool) -> dict[str, Any]:
    check_valid_metric(config["valid_metric"])
    domain = domains.of_dataset(config, dataset)
    return {
        "domain": domain,
        "histories": dataset.histories,
        "backbone": backbone(config, [domain], **reads),
        "prompts": prompts,
        "validation": Validation(config["valid_metric"].lower(), config["valid_users"], dataset.masking.sequential),
        "options": LoopOptions.of(config),
        "seed": config["seed"],
    }
