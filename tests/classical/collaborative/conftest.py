"""Collaborative models, each trained once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.config import LLMConfig
from recbole_llm.store.stages import StageCache

SMALL: dict[str, Any] = {
    "epochs": 1,
    "train_batch_size": 64,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "n_heads": 2,
    "mf_embedding_size": 8,
    "mlp_embedding_size": 8,
    "mlp_hidden_size": [16, 8],
    "learning_rate": 0.01,
}
SEQUENTIAL = ["SASRec", "GRU4Rec", "NextItNet", "BERT4Rec"]
GENERAL = ["BPR", "NeuMF", "LightGCN"]

Make = Callable[..., CollaborativeModel]


@pytest.fixture(scope="session")
def make(shared_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(name, **values)``: a model that was trained, or taken over from ``checkpoint``, and loaded; made once."""
    kept: dict[str, CollaborativeModel] = {}
    cache = StageCache(tmp_path_factory.mktemp("stages"))

    def make(name: str, checkpoint: Any = None, values: dict[str, Any] | None = None, **changes: Any) -> CollaborativeModel:
        key = f"{name} {checkpoint} {values} {changes}"
        if key not in kept:
            config = LLMConfig("ALLMRec", "tiny", config_dict=shared_settings)
            model = CollaborativeModel(config, name, {**SMALL, **changes} if values is None else values, checkpoint)
            model.folder = cache.run(model.stage)  # type: ignore[attr-defined]
            model.load(model.folder)  # type: ignore[attr-defined]
            kept[key] = model
        return kept[key]

    return make


def asked(cf: CollaborativeModel) -> tuple[Interaction, list[int], list[list[int]]]:
    """The test users as RecBole's own loader asks about them, and the same in plain lists."""
    interaction = next(iter(cf.loaders[2]))[0]
    users = interaction["user_id"].tolist()
    return interaction, users, [cf.histories.before(user, "test").tolist() for user in users]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
