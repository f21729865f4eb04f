"""Metrics of a full ranking against ten lines of numpy that read the .inter file themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader

K = 5
MODELS = ["BPR", "SASRec", "AlphaRec"]
SEQUENTIAL = ["SASRec"]


def histories(data_path: Path) -> dict[str, list[str]]:
    """The items of each user in time order."""
    rows = [line.split("\t") for line in (data_path / "tiny" / "tiny.inter").read_text().splitlines()[1:]]
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: float(row[2])):
        found.setdefault(user, []).append(item)
    return found


def reference(made: SimpleNamespace, loader: Any, known: dict[str, list[str]], held_out: int, masked: bool) -> dict[str, float]:
    """Hit, NDCG and MRR of the item ``held_out`` places from the end."""
    data, gains = loader._dataset, []
    for interaction, *_ in loader:
        with torch.no_grad():
            scores = made.model.full_sort_predict(interaction).view(len(interaction), -1).numpy().astype(np.float64)
        for row, user in zip(scores, data.id2token("user_id", interaction["user_id"].numpy()), strict=True):
            items = [data.token2id("item_id", item) for item in known[user]]
            rivals = {*range(1, len(row))} - ({*items[:-held_out]} if masked else set())
            gains.append(1 + sum(row[item] > row[items[-held_out]] for item in rivals))
    ranks = np.array(gains)
    found = ranks <= K
    values = {"hit": found, "ndcg": found / np.log2(1 + ranks), "mrr": found / ranks}
    return {f"{name}@{K}": float(value.mean()) for name, value in values.items()} | {"users": len(ranks)}


@pytest.fixture(scope="module", params=MODELS)
def made(request: Any, module_settings: dict[str, Any], assemble: Callable[..., Any]) -> SimpleNamespace:
    """A model of two epochs; a sequential one reads fewer items than the histories have."""
    full = {"eval_args": {"mode": "full"}, "epochs": 2, "topk": [K], "MAX_ITEM_LIST_LENGTH": 3, "metric_decimal_place": 12}
    made = assemble(request.param, module_settings, **full)
    made.trainer.fit(made.train, made.valid, saved=True)
    made.name, made.settings = request.param, {**module_settings, **full}
    return made


@pytest.mark.parametrize("mask_history", [True, False])
def test_metrics_are_those_of_the_reference(
    made: SimpleNamespace, mask_history: bool, data_path: Path, assemble: Callable[..., Any]
) -> None:
    """Unless it masks for all, RecBole masks for general models alone."""
    other = assemble(made.name, made.settings, mask_history=mask_history)
    masked, known = mask_history or made.name not in SEQUENTIAL, histories(data_path)
    for loader, held_out in ((other.test, 1), (other.valid, 2)):
        found = made.trainer.evaluate(loader)
        expected = reference(made, loader, known, held_out, masked)
        assert expected.pop("users") == len(made.trainer.ranks.users) == 60
        assert dict(found) == pytest.approx(expected, abs=1e-9)
        assert expected != pytest.approx(reference(made, loader, known, held_out, not masked), abs=1e-9)  # it matters here
    assert other.test._dataset.known_items is None or masked


def test_general_models_are_masked_as_by_recbole(made: SimpleNamespace) -> None:
    """RecBole has the same items for them, also where a split has several targets."""
    if made.name in SEQUENTIAL:
        pytest.skip("RecBole masks nothing for sequential models")
    for loader in (made.valid, made.test):
        theirs = FullSortEvalDataLoader(loader.config, loader._dataset, loader._sampler)
        for interaction, (rows, items), positive_u, positive_i in theirs:
            ours = loader._dataset.known_items.of(interaction["user_id"], positive_u, positive_i)
            assert sorted(zip(*map(torch.Tensor.tolist, ours), strict=True)) == sorted(
                zip(rows.tolist(), items.tolist(), strict=True)
            )
