"""Models learn what can be learnt, and nothing else: items that follow a rule, items that follow none, and items never seen.

The class of the next item is determined by the classes of the last two, its number within the class is random, and a title names
the class. Of 20 candidates 0.5 others are of the right class on average, so no model has a Hit@1 far above 0.8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.quick_start import run_recbole_llm

pytestmark = pytest.mark.slow

CLASSES, EACH, USERS, LENGTH = 30, 6, 500, 12
SYLLABLES = ("ka", "lo", "mi", "nu", "re", "so")
CHANCE = 0.05
SETTINGS = {
    "builtin_lm": {"tokens": 150_000, "hidden_size": 64, "num_layers": 2, "vocab_size": 600},
    "train_samples": 500,
    "metrics": ["Hit"],
    "topk": [1, 10],
    "valid_metric": "Hit@1",
    "show_progress": False,
    "use_gpu": False,
}


def data(folder: Path, *, rule: bool) -> dict[str, Any]:
    """Settings of a data set whose histories follow the rule, or none."""
    drawn, rows = np.random.default_rng(7), []
    for user in range(USERS):
        seen: set[int] = set()
        before, last = drawn.integers(CLASSES, size=2)
        for _ in range(LENGTH):
            following = (last + (7 if before % 2 else 1)) % CLASSES if rule else drawn.integers(CLASSES)
            free = [item for item in range(EACH * following, EACH * (following + 1)) if item not in seen]
            item = int(drawn.choice(free or [item for item in range(EACH * CLASSES) if item not in seen]))
            seen.add(item)
            before, last = last, item // EACH
            rows.append(f"u{user}\ti{item}\t{len(rows)}")
    names = [f"{first}{second} {number}" for first in SYLLABLES for second in SYLLABLES for number in range(EACH)]
    (folder / "markov").mkdir(parents=True)
    (folder / "markov" / "markov.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    items = [f"i{item}\t{names[item]}" for item in range(CLASSES * EACH)]
    (folder / "markov" / "markov.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *items, ""]))
    return {**SETTINGS, "data_path": str(folder), "checkpoint_dir": str(folder / "saved")}


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data(tmp_path_factory.mktemp("rule"), rule=True)


@pytest.mark.parametrize("model", ["TALLRec", "ALLMRec"])
def test_llm_models_learn_a_rule(model: str, rule: dict[str, Any]) -> None:
    assert run_recbole_llm(model, "markov", config_dict=rule)["test_result"]["hit@1"] > 0.6


def test_where_there_is_no_rule_they_are_at_chance(tmp_path: Path) -> None:
    """500 users: a standard deviation of 0.01."""
    found = run_recbole_llm("TALLRec", "markov", config_dict=data(tmp_path, rule=False))
    assert found["test_result"]["hit@1"] == pytest.approx(CHANCE, abs=0.03)


def test_a_model_of_titles_ranks_items_that_training_has_never_seen(rule: dict[str, Any]) -> None:
    """They are compared with seen items, which a model of ids prefers: the target is among its last ones."""
    cold = {**rule, "new_items": 0.2}
    titles = run_recbole_llm("TALLRec", "markov", config_dict={**cold, "normalize": "pmi"})["test_result"]
    ids = run_recbole_llm("SASRec", "markov", config_dict={**cold, "epochs": 15})["test_result"]
    assert titles["hit@10"] > 0.9 > 0.5 > ids["hit@10"]
