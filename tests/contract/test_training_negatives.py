"""Negatives of training: none of the user's training history, and nothing held out is spared (that would tell the label)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.data import negatives
from recbole_llm.data.domains import Domain
from recbole_llm.store.stages import in_order

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaRec": ("LlamaRec", {}),
    "LoRACocktail": ("LoRACocktail", {"prompt": "listwise"}),
    "WeaveRec": ("WeaveRec", {"prompt": "listwise"}),
    "ALLMRec, list-wise": ("ALLMRec", {"soft_prompt": "allmrec", "all_positions": True}),
    "ALLMRec, alignment": ("ALLMRec", {"all_positions": True}),
}


Drawn = list[tuple[set[int], set[int]]]  # what a draw excluded, and what it found beside the target


def trained(
    case: str, settings: dict[str, Any], assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Drawn]:
    """A model whose stages with negatives have run, and their draws."""
    model, changes = CASES[case]
    short = {"max_history": 3, "train_samples": 200, "lora_train_mode": "prefix", "candidates": {"num_negatives": 4}}
    short |= {"lora_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 1, "valid_users": 2, "domain_max_views": 1}
    made = assemble(model, settings, **short, **changes)
    drawn: Drawn = []
    for name in ("with_target", "one"):
        draw = getattr(negatives, name)

        def spy(*given: Any, draw: Any = draw, name: str = name) -> Any:
            found = draw(*given)
            target, taken = (given[1], given[2]) if name == "with_target" else (None, given[2])
            drawn.append((set(taken), {found} if name == "one" else set(found) - {target}))
            return found

        monkeypatch.setattr(negatives, name, spy)
    for stage in in_order(made.trainer.plan(made.candidates)):
        if stage.name.startswith(("base", "ingredient", "lora", "verbalizer", "projection", "alignment", "cf", "builtin-text")):
            made.trainer.cache.run(stage)
            if stage.name == "projection" or (case.endswith("alignment") and stage.name == "alignment"):
                break
    return made, drawn


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "WeaveRec")) for case in CASES])
def test_negatives_are_outside_the_whole_training_history_and_may_be_held_out_items(
    case: str, settings: dict[str, Any], assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drawn = trained(case, settings, assemble, monkeypatch)
    histories = made.model.parts.histories
    domains: list[Domain] = [made.model.parts.domain, *getattr(made.model, "general", ()), *getattr(made.model, "others", ())]
    known = {frozenset(history.tolist()) for domain in domains for history in domain.histories}
    whole = {frozenset(histories.train(user).tolist()): user for user in histories.evaluated("test").tolist()}
    assert len(drawn) > 100 and any(len(taken) > 5 for taken, _ in drawn)  # longer than what a prompt shows
    spared, possible = 0, 0
    for taken, found in drawn:
        assert taken in known and not taken & found
        if (user := whole.get(frozenset(taken))) is not None:
            possible += 1
            spared += not found & {histories.target(user, "valid"), histories.target(user, "test")}
    assert 0 < spared < possible


@pytest.mark.parametrize("case", ["LoRACocktail", "ALLMRec, alignment"])
def test_with_repeats_kept_negatives_may_come_from_the_history(
    case: str,
    settings: dict[str, Any],
    data_path: Path,
    tmp_path: Path,
    assemble: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise "the item of the history" would answer every list whose target is a repeat."""
    folder = shutil.copytree(data_path, tmp_path / "data")
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *(row for row in rows for _ in range(2)), ""]))
    made, drawn = trained(case, {**settings, "data_path": str(folder), "rm_dup_inter": None}, assemble, monkeypatch)
    histories = [set(history.tolist()) for history in made.model.parts.domain.histories]
    assert len(drawn) > 100 and {len(taken) for taken, _ in drawn} == {1}
    known = sum(any(taken | {item} <= history for history in histories) for taken, found in drawn for item in found)
    assert known > 100


def test_a_view_leaves_out_what_its_users_have_in_it() -> None:
    """The pool of a view has items of its category alone, so its histories are whole for it."""
    rng, pool = np.random.default_rng(0), np.arange(1, 9)
    rows = [negatives.with_target(rng, 2, {1, 2, 3, 4}, pool, 3) for _ in range(50)]
    assert {item for row in rows for item in row} == {2, 5, 6, 7, 8}
