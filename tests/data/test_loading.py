"""The batches of an evaluation: bounded by users times items, which RecBole counts for general models alone."""

from __future__ import annotations

from typing import Any

import pytest

from recbole_llm.data import loading

FULL, CANDIDATES = {"mode": "full"}, {"mode": "candidates"}


@pytest.mark.parametrize(
    ("model", "mode", "given", "expected"),
    [
        ("BPR", CANDIDATES, 4096, [60]),  # RecBole: 4096 // 41 = 99 users; of 40,000 items, one
        ("BPR", FULL, 1, [60]),
        ("SASRec", FULL, 4096, [24, 24, 12]),
        ("SASRec", FULL, 10, [10] * 6),
        ("SASRec", CANDIDATES, 40, [40, 20]),  # one score for each candidate
    ],
)
def test_users_of_an_evaluation_batch(
    model: str, mode: Any, given: int, expected: list[int], settings: Any, assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SCORES", 1000)  # of 41 items, 24 users
    made = assemble(model, settings, eval_args=mode, eval_batch_size=given)
    assert [len(batch[0]) for batch in made.test] == expected
    assert made.config["eval_batch_size"] == given


def test_random_has_an_order_for_each_batch_and_so_keeps_its_batches(settings: Any, assemble: Any) -> None:
    made = assemble("Random", settings, eval_args=FULL, eval_batch_size=82)
    assert {len(batch[0]) for batch in made.test} == {2}
