"""A plan predicts a run: the LM's tokens exactly, whatever is trained, merged and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from recbole_llm.costs.plan import CACHED
from recbole_llm.planner import TEST, VALIDATION, plan_of
from recbole_llm.store.costs import Tokens, metered

MODELS: dict[str, dict[str, Any]] = {
    "TALLRec": {},
    "TALLRec, list-wise": {"prompt": "listwise", "lora_train_mode": "prefix", "scorer": "prefix"},
    "TALLRec, naive": {"scorer": "naive", "normalize": "pmi", "train_batch_tokens": 100},
    "LlamaRec": {"lora_train_mode": "prefix"},
    "LoRACocktail": {"shuffled_title_control": True},
    "LoRACocktail, first tokens": {"merge_first_tokens": 2, "lora_eval_steps": 3},
    "LoRACocktail, grid": {"merge": "grid"},
    "LoRACocktail, ties": {"merge": "ties"},
    "MoLoRec": {},
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


@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_planned(name: str, settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]) -> None:
    run = assemble(name.partition(",")[0], settings, **MODELS[name])
    plan = plan_of(run.trainer, run.stages, run.valid, run.test)
    lines = {line.name: line for line in plan.lines}
    assert all(line.status != CACHED and line.cost is not None and line.cost.exact for line in plan.lines)
    run.trainer.fit(run.train, run.valid)
    with metered() as tested:
        for variant in run.trainer.recommender.variants().values():
            run.trainer.evaluate(run.test, load_best_model=False, variant=variant)
    measured = {**run.trainer.cache.measured, VALIDATION: run.trainer.validation, TEST: tested}
    assert set(lines) == set(measured)
    for part, found in measured.items():
        cost = lines[part].cost
        assert counts(cost.trained) == counts(found.trained), f"{part}, with gradients"
        assert counts(cost.read) == counts(found.read), f"{part}, without"
