"""KGAT without dgl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix

from recbole_llm.classical import portable_weights
from recbole_llm.classical.kgat import first_attention
from recbole_llm.classical.retriever import Retriever
from recbole_llm.config import LLMConfig
from recbole_llm.store.stages import StageCache
from tests.contract import recbole_data


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of a training after which the attention is another one than at first."""
    settings = recbole_data.settings("KGAT", "knowledge_aware", recbole_data.write(tmp_path / "rich"), tmp_path)
    return settings | {"epochs": 2, "learning_rate": 0.05}


def test_a_retriever_from_the_cache_scores_as_the_trained_one(given: dict[str, Any], tmp_path: Path) -> None:
    values = {"epochs": 2, "learning_rate": 0.05, "train_batch_size": 128}
    config = LLMConfig("TALLRec", "rich", config_dict={**given, "retriever": "KGAT", "retriever_config": values})
    trained = Retriever(config)
    folder = StageCache(tmp_path).run(trained.stage)
    again = Retriever(config)
    users = next(iter(trained.loaders[2]))[0]
    for one in (trained, again):
        one.load(folder)
    assert torch.equal(trained.scores(users), again.scores(users))


def test_shared_weights_score_as_the_trained_ones(
    given: dict[str, Any], tmp_path: Path, assemble: Callable[..., SimpleNamespace]
) -> None:
    trained, again = (assemble("KGAT", given, "rich") for _ in range(2))
    trained.trainer.fit(trained.train, trained.valid)
    portable_weights.write(Path(trained.trainer.saved_model_file), file := tmp_path / "weights.safetensors")
    users = next(iter(trained.test))[0]
    found = []
    for one, weights in ((trained, trained.trainer.saved_model_file), (again, str(file))):
        one.trainer._load_weights(weights)
        one.model.eval()
        found.append(one.model.full_sort_predict(users))
    assert torch.equal(*found)


def test_the_first_attention_is_the_sum_of_the_adjacency_matrices_normalised_by_relation() -> None:
    rng, nodes, relations = np.random.default_rng(0), 12, 4
    heads, tails, kinds = rng.integers(0, nodes, 60), rng.integers(0, nodes, 60), rng.integers(0, relations, 60)
    expected = np.zeros((nodes, nodes))
    for kind in range(1, relations):  # relation 0 is padding
        own = np.zeros((nodes, nodes))
        np.add.at(own, (heads[kinds == kind], tails[kinds == kind]), 1)  # an edge may occur twice
        expected += own / np.maximum(own.sum(axis=1, keepdims=True), 1)
    found = first_attention(coo_matrix((kinds, (heads, tails)), shape=(nodes, nodes)), relations)
    assert found.is_sparse and torch.allclose(found.to_dense(), torch.tensor(expected).float())
