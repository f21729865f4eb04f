"""The training split as rows: every interaction once, every transition once, also where files were split elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data import training_rows
from recbole_llm.data.training_rows import TrainingRows, time_fields

CONFIG = {"LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length", "TIME_FIELD": "timestamp"}


def split(rows: list[tuple[int, list[int], int]], timed: bool = True) -> Any:
    """A training split; an item's time is ten times its id."""
    length = max(len(history) for _, history, _ in rows)
    histories = torch.tensor([history + [0] * (length - len(history)) for _, history, _ in rows])
    columns = {
        "user_id": torch.tensor([user for user, _, _ in rows]),
        "item_id": torch.tensor([target for *_, target in rows]),
        "item_id_list": histories,
        "item_length": torch.tensor([len(history) for _, history, _ in rows]),
    }
    columns |= {"timestamp": 10.0 * columns["item_id"], "timestamp_list": 10.0 * histories} if timed else {}
    return SimpleNamespace(inter_feat=Interaction(columns), config=CONFIG, uid_field="user_id", iid_field="item_id")


def pairs_of(rows: TrainingRows, most: int) -> dict[int, list[tuple[int, int]]]:
    """Pairs by the steps between their items."""
    found: dict[int, list[tuple[int, int]]] = {}
    for before, after, steps in rows.transitions(most):
        for first, second, step in zip(before.tolist(), after.tolist(), steps.tolist(), strict=True):
            found.setdefault(step, []).append((first, second))
    return {step: sorted(pairs) for step, pairs in found.items()}


AUGMENTED = split([(1, [5], 6), (1, [5, 6], 7), (1, [5, 6, 7], 8), (2, [9], 5)])
SPLIT_ELSEWHERE = split([(1, [5, 6, 7], 8), (2, [9], 5)])  # the longest prefix of a user alone


def test_interactions_of_the_training_split_are_those_before_the_validation_item(assemble: Any, settings: dict[str, Any]) -> None:
    train = assemble("RepeatRule", settings, MAX_ITEM_LIST_LENGTH=3).train._dataset
    items, times = TrainingRows(train).interactions
    histories = train.histories
    assert np.bincount(items, minlength=train.item_num).tolist() == histories.train_counts.tolist() and times is not None
    found = pairs_of(TrainingRows(train), 2)[2]
    expected = [
        pair for user in range(len(histories.items)) for pair in zip(*(histories.train(user)[k:] for k in (0, 2)), strict=False)
    ]
    assert found == sorted((int(i), int(j)) for i, j in expected)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_both_forms_have_the_same_interactions_and_transitions(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "_BLOCK", block)
    for rows in map(TrainingRows, (AUGMENTED, SPLIT_ELSEWHERE)):
        items, times = rows.interactions
        assert sorted(items.tolist()) == [5, 5, 6, 7, 8, 9] and times is not None and (times == 10 * items).all()
        assert pairs_of(rows, 5) == {1: [(5, 6), (6, 7), (7, 8), (9, 5)], 2: [(5, 7), (6, 8)], 3: [(5, 8)]}


def test_without_times_there_are_none() -> None:
    assert TrainingRows(split([(1, [5], 6)], timed=False)).interactions[1] is None
    assert time_fields(CONFIG) == ("timestamp_list", "timestamp")
