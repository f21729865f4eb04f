"""AlphaRec: text vectors through one network and LightGCN's convolution; nothing belongs to an item or a user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from recbole_llm.model.alpharec import SparseProduct, hidden_width
from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture(scope="module")
def made(module_settings: dict[str, Any], assemble: Any) -> Any:
    """The untrained network over text vectors."""
    made = assemble("AlphaRec", module_settings, embedding_size=8, num_negatives=12)
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    return made


def text_vectors(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.mean_of_items(model.text_vectors), model.text_vectors


def test_a_user_is_the_mean_of_the_training_items_alone(made: Any) -> None:
    users, items = text_vectors(made.model)
    histories = made.train._dataset.histories
    for user in (1, 7, 60):
        trained = histories.train(user)  # neither the validation nor the test item
        torch.testing.assert_close(users[user], items[trained].mean(0), atol=1e-6, rtol=1e-5)
    assert not items[0].any() and not users[0].any() and items[1:].any(1).all()


def test_vectors_are_those_of_the_convolution_over_projected_texts(made: Any) -> None:
    model, histories = made.model, made.train._dataset.histories
    size = model.n_users + model.n_items
    graph = torch.zeros(size, size)
    for user in range(1, model.n_users):
        graph[user, model.n_users + torch.from_numpy(histories.train(user))] = 1
    graph = graph + graph.T
    degree = (graph.sum(1) + 1e-7).rsqrt()
    graph = degree[:, None] * graph * degree  # [U + I, U + I]
    with torch.no_grad():
        hop = model.project(torch.cat(text_vectors(model)))
        expected = (hop + graph @ hop + graph @ graph @ hop) / 3  # two layers
        found = torch.cat(model.forward())
    torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


def test_a_sparse_product_has_the_values_and_gradients_of_a_dense_one() -> None:
    matrix = np.random.default_rng(0).random((5, 7)) * (np.random.default_rng(1).random((5, 7)) < 0.4)
    product, dense = SparseProduct(csr_matrix(matrix), torch.device("cpu")), torch.randn(7, 3, requires_grad=True)
    expected = torch.from_numpy(matrix).float() @ dense
    torch.testing.assert_close(product(dense), expected)
    weights = torch.randn(5, 3)
    found, wanted = (torch.autograd.grad((result * weights).sum(), dense)[0] for result in (product(dense), expected))
    torch.testing.assert_close(found, wanted)


def test_a_loss_in_half_precision_has_exact_sparse_products(made: Any) -> None:
    batch = next(iter(made.train))[:5]
    with torch.autocast("cpu", enabled=True):  # enable_amp
        loss = made.model.calculate_loss(batch)
    gradients = torch.autograd.grad(loss, [*made.model.project.parameters()])
    assert loss.isfinite() and all(part.isfinite().all() for part in gradients)


def test_negatives_of_recboles_loader_are_refused(module_settings: dict[str, Any], assemble: Any) -> None:
    """They would be pairs like those that users have chosen."""
    with pytest.raises(ValueError, match="train_neg_sample_args: .*'uniform'.*AlphaRec's loss draws .*--num_negatives=7"):
        assemble("AlphaRec", module_settings, num_negatives=7, train_neg_sample_args={"distribution": "uniform"})


def test_loss_is_infonce_and_what_a_user_knows_is_no_negative(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made.model, next(iter(made.train))[:5]
    drawn = torch.arange(1, 13)
    monkeypatch.setattr(torch, "randint", lambda *bounds: {(model.n_items - 1, (12,)): drawn - 1}[bounds])
    with torch.no_grad():
        loss, (users, items) = model.calculate_loss(batch), model.forward()
    histories, terms = made.train._dataset.histories, []
    for user, item in zip(batch["user_id"].tolist(), batch["item_id"].tolist(), strict=True):
        known = set(histories.train(user).tolist())
        compared = [item, *(other for other in drawn.tolist() if other not in known)]
        terms.append(-(items[compared] @ users[user] / 0.15).log_softmax(0)[0])
        assert len(compared) < 13 or not known & set(drawn.tolist())
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)


def test_new_items_are_no_negatives(module_settings: dict[str, Any], assemble: Any) -> None:
    model = (made := assemble("AlphaRec", module_settings, new_items=0.2)).model
    new = made.train._dataset.histories.scenario.new
    assert new and {*model.pool.tolist()} == {*range(1, model.n_items)} - new


def test_no_parameter_belongs_to_an_item_or_a_user(made: Any) -> None:
    width = made.model.text_vectors.shape[1]
    shapes = {name: tuple(p.shape) for name, p in made.model.named_parameters()}
    assert shapes == {
        "project.0.weight": (width // 2, width),
        "project.0.bias": (width // 2,),
        "project.2.weight": (8, width // 2),
        "project.2.bias": (8,),
    }


def test_scores_are_cosines_and_follow_training(made: Any) -> None:
    model, (interaction, *_) = made.model, next(iter(made.test))
    with torch.no_grad():
        before = model.full_sort_predict(interaction[:4]).view(4, -1)
    assert before.abs().max() <= 1 + 1e-5 and before.shape == (4, model.n_items)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.calculate_loss(next(iter(made.train))).backward()
    optimizer.step()
    with torch.no_grad():  # scores that evaluation had cached are not those of the trained model
        assert not torch.equal(before, model.full_sort_predict(interaction[:4]).view(4, -1))


def test_texts_are_encoded_once_and_training_learns(module_settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    changes = {"epochs": 30, "learning_rate": 1e-2, "embedding_size": 16, "num_negatives": 30, "train_batch_size": 256}
    hits = []
    for epochs in (1, 30):
        result = run_recbole_llm("AlphaRec", "tiny", config_dict={**module_settings, **changes, "epochs": epochs})
        hits.append(result["best_valid_result"]["ndcg@5"])
    record = json.loads(Path(result["record"]).read_text())
    assert record["backbone"].startswith("builtin") and record["stage_seconds"] == {"builtin-text-encoder": 0.0}
    assert hits[1] > hits[0] and np.isfinite(hits).all()


@pytest.mark.parametrize("width, hidden", [(768, 6144), (1536, 3072), (3072, 1536), (4096, 1152), (384, 192), (64, 32)])
def test_the_hidden_width_is_the_papers_by_the_width_of_the_text_vectors(width: int, hidden: int) -> None:
    """8, 2, 1/2 and 9/32 widths in the authors' code; half for encoders that are narrower than any of theirs."""
    assert hidden_width(width) == hidden


def test_a_small_multiplier_leaves_a_hidden_unit(module_settings: dict[str, Any], assemble: Any) -> None:
    model = assemble("AlphaRec", module_settings, hidden_multiplier=0.001).model
    model._build(torch.rand(model.n_items, 64))
    assert model.project[0].out_features == 1
