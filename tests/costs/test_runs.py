"""A plan predicts a run: the LM's tokens exactly, whatever is trained, merged and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from recbole_llm.costs.plan import CACHED, Plan
from recbole_llm.evaluation import generated
from recbole_llm.llm import checks
from recbole_llm.llm.generation import Generator
from recbole_llm.llm.lora import attach_lora, save_adapter
from recbole_llm.llm.reading import Reading
from recbole_llm.planner import ANSWERS, TEST, VALIDATION, plan_of
from recbole_llm.store.costs import Tokens, metered

MODELS: dict[str, dict[str, Any]] = {
    "TALLRec": {},
    "TALLRec, list-wise": {"prompt": "listwise", "lora_train_mode": "prefix", "scorer": "prefix"},
    "TALLRec, naive": {"scorer": "naive", "normalize": "pmi", "train_batch_tokens": 100},
    "LlamaRec": {"lora_train_mode": "prefix"},
    "TALLRec, yes or no": {
        "tallrec_form": "yes_no",
        "prompt": "tallrec_yes_no",
        "title_quote": "'\"'",
        "history_separator": ", ",
        "lora_train_mode": "prefix",
    },
    "LoRACocktail": {"shuffled_title_control": True, "memorisation": True},
    "LoRACocktail, merges beside another": {"merge_beside": {"best": {"merge": "grid"}, "agreeing": {"merge": "agreement"}}},
    "LoRACocktail, held-out examples": {"lora_valid": "loss", "held_out": 0.2},
    "LoRACocktail, several rates": {"merge_start": "uniform", "merge_steps": 2, "merge_learning_rate": [0.1, 1.0]},
    "LoRACocktail, first tokens": {"merge_first_tokens": 1, "lora_eval_steps": 3},
    "LoRACocktail, auto and its report": {
        "merge": "auto",
        "merge_report": True,
        "merge_first_tokens": 1,
        "merge_granularity": "module",
    },
    "LoRACocktail, ties": {"merge": "ties"},
    "MoLoRec": {"merge_learning_rate": [0.5, 1.0]},
    "WeaveRec": {"weave_controls": ["naive_merging"]},
    "ALLMRec": {},
    "Laser": {"warmup_epochs": 1, "single_share": 0.0},
    "TALLRec, builtin": {
        "llm_path": "builtin",
        "builtin_lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 900},
    },
}
EXACT = ("passes", "fed", "pairs", "logits", "most_fed", "most_cached", "most_logits")


def counts(tokens: Tokens) -> dict[str, int]:
    return {name: getattr(tokens, name) for name in EXACT}


def planned_and_run(run: SimpleNamespace) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what was measured by the names of its lines."""
    plan = plan_of(run.trainer, run.stages, run.train, run.valid, run.test)
    run.trainer.fit(run.train, run.valid)
    with metered() as tested:
        for variant in run.trainer.recommender.variants().values():
            run.trainer.evaluate(run.test, load_best_model=False, variant=variant)
    return plan, {**run.trainer.cache.measured, VALIDATION: run.trainer.validation, TEST: tested}


QUICK = ("TALLRec, builtin", "LoRACocktail", "ALLMRec", "Laser")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MODELS])
def test_every_token_is_planned(name: str, settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]) -> None:
    run = assemble(name.partition(",")[0], settings, **MODELS[name])
    plan, measured = planned_and_run(run)
    lines = {line.name: line for line in plan.lines}
    assert all(line.status != CACHED and line.cost is not None and line.cost.exact for line in plan.lines)
    assert set(lines) == set(measured) and len(lines) == len(plan.lines)
    for rule in {"cocktail-best", "cocktail-agreeing"} & lines.keys():  # the lattice is scored once, in its own stage
        assert lines["cocktail-lattice-3"].cost.read.fed > lines[rule].cost.read.fed == 0
    for part, found in measured.items():
        cost = lines[part].cost
        assert counts(cost.trained) == counts(found.trained), f"{part}, with gradients"
        if part == TEST and "normalize" in MODELS[name]:  # the validation has read some titles without a history
            assert cost.at_most and 0.9 * cost.read.fed < found.read.fed < cost.read.fed
        else:
            assert counts(cost.read) == counts(found.read), f"{part}, without"


@pytest.mark.slow
def test_the_plan_follows_how_the_lm_is_run_exactly(
    settings: dict[str, Any], assemble: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for an LM that neither padding nor a shared beginning suits."""
    reading = Reading(scorer="prefix", padding=False, share=False)
    monkeypatch.setattr(checks, "exact_reading", lambda *_, **__: reading)
    run = assemble("LoRACocktail", settings)
    run.trainer.check()
    plan, measured = planned_and_run(run)
    for line in plan.lines:
        cost, found = line.cost, measured[line.name]
        assert cost is not None and counts(cost.trained) == counts(found.trained) and counts(cost.read) == counts(found.read)
    other = plan_of(
        *(
            getattr(assemble("LoRACocktail", {**settings, "checkpoint_dir": settings["checkpoint_dir"] + "-2"}), name)
            for name in ("trainer", "stages", "train", "valid", "test")
        )
    )
    assert [line.cost for line in other.lines] != [line.cost for line in plan.lines]  # with padding, as long as nothing is known


@pytest.mark.slow
def test_a_given_adapter_has_no_training_and_its_own_size(
    settings: dict[str, Any], assemble: Callable[..., SimpleNamespace], tiny_lm: Path, tmp_path: Path
) -> None:
    model = attach_lora(
        AutoModelForCausalLM.from_pretrained(tiny_lm),
        name="x",
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        target_modules=["q_proj"],
        seed=0,
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    save_adapter(model, "x", tmp_path / "given")
    run = assemble("LoRACocktail", settings, adapters={"base spirit": str(tmp_path / "given")}, merge_granularity="module")
    plan, measured = planned_and_run(run)
    given, *others = plan.lines
    assert given.cost is not None and "nothing is trained" in given.cost.note and given.cost.tokens == Tokens()
    for line in others:
        cost, found = line.cost, measured[line.name]
        assert cost is not None and counts(cost.trained) == counts(found.trained) and counts(cost.read) == counts(found.read)
    merge = next(line.cost for line in others if line.name == "cocktail")
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained = next(line.cost for line in others if line.name == "ingredient")
    assert merge is not None and trained is not None
    assert merge.memory["adapters"] == 4 * (size + (trained.parameters or 0))


@pytest.mark.parametrize("name", ["TALLRec", "ALLMRec"])
def test_generated_answers_cost_at_most_what_is_planned(
    name: str, settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]
) -> None:
    run = assemble(name, settings, scoring="published", published_max_new_tokens=5)
    plan, _ = planned_and_run(run)
    recommender, candidates = run.trainer.recommender, run.test.candidates
    ranks = {name: run.trainer.ranks for name in recommender.variants()}
    with metered() as found:
        generated.evaluate(run.config, recommender, candidates, ranks)
    line = plan.lines[-1]
    assert line.name == ANSWERS and line.cost is not None and line.cost.at_most and f"≤{line.cost.read.fed:,}" in str(plan)
    planned = line.cost.read
    assert all(0 < counts(found.read)[key] <= counts(planned)[key] for key in EXACT)
    # prompts are read whole; only the later tokens of answers are a bound
    assert planned.most_fed == found.read.most_fed and found.trained == Tokens()
    most = 2 * 4 * len(candidates.users)  # two rows, and the last of five tokens is not read
    assert planned.fed - found.read.fed <= most


def test_answers_that_never_end_cost_exactly_what_is_planned(
    settings: dict[str, Any], assemble: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "__call__", partialmethod(_endless, Generator.__call__))
    run = assemble("TALLRec", settings, scoring="published", published_max_new_tokens=5)
    plan, _ = planned_and_run(run)
    ranks = {name: run.trainer.ranks for name in run.trainer.recommender.variants()}
    with metered() as found:
        generated.evaluate(run.config, run.trainer.recommender, run.test.candidates, ranks)
    (cost,) = [line.cost for line in plan.lines if line.name == ANSWERS]
    assert cost is not None and counts(cost.read) == counts(found.read)


def _endless(self: Generator, call: Any, lm: Any, prompts: Any, soft: Any = None, complete: Any = None) -> list[str]:
    """Without an end token that the LM could choose, and whatever is complete."""
    return call(self, lm, prompts, soft, None)
