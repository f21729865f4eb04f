"""Pop counts the training interactions: neither batches nor sampled negatives."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("batch", [7, 100_000])
def test_its_counts_are_those_of_the_training_interactions(
    batch: int, settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]
) -> None:
    made = assemble("Pop", settings, train_batch_size=batch)
    made.trainer.fit(made.train, made.valid)
    train = made.train._dataset
    counts = torch.bincount(train.inter_feat[train.iid_field], minlength=train.item_num)
    assert counts.max() > 10 and torch.equal(made.model.item_cnt.squeeze(1), counts)


def test_its_result_does_not_depend_on_the_batch_size(settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]) -> None:
    results = []
    for batch in (7, 512):
        made = assemble("Pop", settings, train_batch_size=batch)
        made.trainer.fit(made.train, made.valid)
        results.append(dict(made.trainer.evaluate(made.test)))
    assert results[0] == results[1]


def test_an_eval_step_of_several_epochs_validates_after_its_only_one(
    settings: dict[str, Any], assemble: Callable[..., SimpleNamespace]
) -> None:
    made = assemble("Pop", settings, epochs=9, eval_step=5)
    score, _ = made.trainer.fit(made.train, made.valid)
    assert score > 0 and made.trainer.evaluate(made.test)
