"""Every position of every history once an epoch, within the budgets, by the seed alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.llm.windows import WindowBatches

BEGIN, PAD = 1, 0
ANSWERS = [[], *([10 + item] * (1 + item % 3) + [5] for item in range(30))]  # item i: 1 to 3 tokens and a separator


def batches_of(histories: Any, **settings: int) -> WindowBatches:
    defaults = {"window": 4, "batch_tokens": 40, "tokens": 10**9, "epochs": 1, "seed": 7}
    return WindowBatches(ANSWERS, histories, begin=BEGIN, pad=PAD, **(defaults | settings))


def rows_of(batches: WindowBatches) -> list[list[int]]:
    return [
        [token for token in row if token != PAD]
        for batch in map(batches.__getitem__, range(len(batches)))
        for row in batch.tolist()
    ]


def items_of(row: list[int]) -> list[int]:
    return [before - 9 for before, token in zip(row, row[1:], strict=False) if token == 5]


@given(st.lists(st.lists(st.integers(1, 20), max_size=15), min_size=1, max_size=12).filter(any), st.integers(1, 9))
def test_an_epoch_holds_every_position_once_in_windows_of_one_history(histories: list[list[int]], window: int) -> None:
    rows = rows_of(batches_of(histories, window=window))
    assert all(row[0] == BEGIN for row in rows)
    assert Counter(item for row in rows for item in items_of(row)) == Counter(item for h in histories for item in h)
    for items in map(items_of, rows):
        assert 1 <= len(items) <= window
        assert any(items == history[at : at + len(items)] for history in histories for at in range(len(history)))


def test_windows_are_cut_elsewhere_in_each_epoch_and_short_histories_stay_whole() -> None:
    rows = [items_of(row) for row in rows_of(batches_of([list(range(1, 21)), [3, 4, 5]], epochs=6))]
    assert len({row[0] for row in rows if len(row) == 4}) > 5
    assert rows.count([3, 4, 5]) >= 6


def test_batches_keep_their_budget_except_for_a_single_long_row() -> None:
    histories = [list(range(1, 1 + length)) for length in (2, 3, 5, 8, 13)]
    shapes = [batch.shape for batch in map(batches_of(histories, window=8, batch_tokens=20).__getitem__, range(5))]
    assert any(rows > 1 for rows, _ in shapes)
    assert all(rows == 1 or rows * length <= 20 for rows, length in shapes)


def test_tokens_end_the_plan_within_one_batch() -> None:
    batches = batches_of([[1, 2, 3, 4]] * 50, tokens=500, epochs=99)
    predicted = [int((batch != PAD).sum()) - len(batch) for batch in map(batches.__getitem__, range(len(batches)))]
    assert sum(predicted[:-1]) < 500 <= sum(predicted)


def test_the_seed_alone_decides() -> None:
    histories = [np.arange(1, 19), [5, 6, 7], [], np.arange(3, 9)]
    one, same, other = (batches_of(histories, epochs=2, seed=seed) for seed in (7, 7, 8))
    np.random.seed(0)
    order = list(range(len(one)))
    assert [one[step].tolist() for step in order] == [same[step].tolist() for step in reversed(order)][::-1]
    assert rows_of(one) != rows_of(other)


@pytest.mark.parametrize("window", [1, 100])
def test_extreme_windows(window: int) -> None:
    lengths = {len(items_of(row)) for row in rows_of(batches_of([list(range(1, 13))], window=window))}
    assert lengths == {min(window, 12)}
