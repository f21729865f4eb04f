"""Encoders, on a tiny trained Laser: one ranking whichever method computes it, and vectors that nothing around them changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.utils.case_study import full_sort_scores, full_sort_topk
from torch import Tensor

from recbole_llm.evaluation.ranks import gather_scores
from recbole_llm.model.parts import histories_of

Made = SimpleNamespace
FULL = {"eval_args": {"mode": "full"}}


@pytest.fixture(scope="module")
def full(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Made:
    """A model that ranks the whole catalogue, with seven test users."""
    return fitted(assemble("Laser", module_settings, **FULL))


@pytest.fixture(scope="module")
def listed(full: Made, module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Made:
    """The same model from its cached stages, which ranks candidates."""
    made = fitted(assemble("Laser", module_settings))
    made.candidates = made.test.candidates.lookup(made.interaction["user_id"], made.targets)
    return made


def fitted(made: Made) -> Made:
    made.trainer.fit(made.train, made.valid)
    batch = next(iter(made.test))
    made.interaction, made.targets = batch[0][:7], batch[3][:7]
    made.histories = histories_of(made.model, made.interaction)
    return made


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# -- one ranking -------------------------------------------------------------------------------------------------------


def test_the_scores_of_candidates_are_those_of_the_whole_catalogue_in_their_columns(full: Made, listed: Made) -> None:
    assert [*listed.trainer.cache.seconds.values()] == [0.0] * 3  # it is the same model
    whole = full.model.full_sort_predict(full.interaction)
    few = listed.model.score_candidates(listed.interaction, listed.candidates)
    assert whole.shape == (7, 41) and few.shape == (7, 10) and few.std(1).min() > 1e-3
    close(whole.gather(1, listed.candidates), few)
    close(gather_scores(full.model, full.interaction, listed.candidates, "item_id"), few)


def test_predict_is_the_score_of_the_rows_own_item(full: Made) -> None:
    model, batch = full.model, next(iter(full.train))[:9]
    whole = model.full_sort_predict(batch)
    close(model.predict(batch), whole[torch.arange(9), batch["item_id"]])


def test_a_score_is_the_cosine_of_a_users_and_an_items_vector(full: Made) -> None:
    users, items = full.model.encode_users(full.interaction), full.model.encode_items()
    whole = full.model.full_sort_predict(full.interaction)
    for user, row in zip(users, whole, strict=True):
        close(torch.cosine_similarity(user[None], items[1:]), row[1:])
    assert not whole[:, 0].any()


@pytest.mark.parametrize("k", [1, 5, 40])
def test_recommend_is_the_top_of_the_whole_catalogue_without_the_padding_item(full: Made, k: int) -> None:
    whole = full.model.full_sort_predict(full.interaction)
    whole[:, 0] = -torch.inf
    best = whole.topk(k)
    scores, items = full.model.recommend(full.interaction, k)
    assert torch.equal(items, best.indices) and items.dtype == torch.long
    close(scores, best.values)


def test_of_fewer_items_than_k_all_are_recommended_and_never_the_padding_item(full: Made) -> None:
    scores, items = full.model.recommend(full.interaction, 50)
    assert items.sort().values.tolist() == [[*range(1, 41)]] * 7 and scores.isfinite().all()


def test_recboles_case_study_ranks_the_catalogue_and_never_the_padding_item(full: Made) -> None:
    users = full.interaction["user_id"].numpy()
    scores = full_sort_scores(users, full.model, full.test)
    best, items = full_sort_topk(users, full.model, full.test, k=40)
    close(scores[:, 1:], full.model.full_sort_predict(full.interaction)[:, 1:])
    assert scores[:, 0].eq(-torch.inf).all() and best.isfinite().all()
    for row in items.tolist():
        assert sorted(row) == [*range(1, 41)]
    assert torch.equal(items[:, :5], full.model.recommend(full.interaction, 5)[1])


def test_a_full_evaluation_gives_the_metrics_of_the_ranks_outside_the_history(full: Made) -> None:
    hits, users = 0, 0
    for interaction, _, _, targets in full.test:
        whole = full.model.full_sort_predict(interaction)
        whole[:, 0] = -torch.inf
        for row, user in zip(whole, interaction["user_id"].tolist(), strict=True):
            row[full.model.parts.histories.before(user, "test")] = -torch.inf
        hits += sum(target in row for target, row in zip(targets.tolist(), whole.topk(5).indices.tolist(), strict=True))
        users += len(targets)
    assert users == 60 and full.trainer.evaluate(full.test)["hit@5"] == pytest.approx(hits / users, abs=1e-4)


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_the_cached_item_matrix_is_what_encode_items_computes(full: Made, listed: Made) -> None:
    for made in (full, listed):
        close(made.model.encode_items(), made.model.item_matrix)
    assert torch.equal(full.model.item_matrix, listed.model.item_matrix)


def test_vectors_have_unit_length_and_the_padding_items_is_zero(full: Made) -> None:
    items, users = full.model.item_matrix, full.model.encode_histories([[], [3], *full.histories])
    assert items.shape == (41, 32) and users.shape == (9, 32) and not items[0].any()
    close(items[1:].norm(dim=1), torch.ones(40))
    close(users.norm(dim=1), torch.ones(9))
    assert items[1:].std(0).max() > 1e-2  # and they are not all the same one


def test_neither_padding_nor_the_rest_of_the_batch_changes_a_score(full: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, histories = full.model, [[], [3], [9, 2, 6], *full.histories]
    assert len({*map(len, histories)}) > 4
    together, order = model.encode_histories(histories), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    close(torch.cat([model.encode_histories([history]) for history in histories]), together)
    close(model.encode_histories([histories[i] for i in order]), together[order])
    for tokens in (1, 300, 9999):  # one row at a time, a few, all of them
        monkeypatch.setattr(model.reader, "_batch_tokens", tokens)
        close(model.encode_histories(histories), together)
        close(model.encode_items(), model.item_matrix)
    one = [model.full_sort_predict(full.interaction[row : row + 1]) for row in range(7)]
    close(torch.cat(one), model.full_sort_predict(full.interaction))


def test_no_score_encodes_an_item_again(full: Made, listed: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, matrix, calls = full.model, full.model.item_matrix, []
    monkeypatch.setattr(model.reader, "encode_items", lambda tower: calls.append(1))
    model.full_sort_predict(full.interaction)
    model.score_candidates(full.interaction, listed.candidates)
    assert model.item_matrix is matrix and not calls
    model.encode_items()
    assert calls == [1]


# -- validation --------------------------------------------------------------------------------------------------------


def naive_score(model: Any, users: list[int], k: int) -> float:
    """Mean NDCG@k of validation targets among all items outside the history: one user, one item at a time."""
    total = 0.0
    for user in users:
        items = model.parts.histories.items[user].tolist()
        vector, target = model.encode_histories([items[:-2]])[0], items[-2]
        own = float(vector @ model.item_matrix[target])
        rank = 1 + sum(float(vector @ model.item_matrix[item]) > own + 1e-7 for item in {*range(1, 41)} - {*items[:-1]})
        total += 1 / math.log2(1 + rank) if rank <= k else 0
    return total / len(users)


def valid_score(model: Any, matrix: Tensor | None = None) -> float:
    return model.valid_score(model.encode_histories, model.item_matrix if matrix is None else matrix)


def with_validation(made: Made, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    parts = made.model.parts
    monkeypatch.setattr(made.model, "parts", replace(parts, validation=replace(parts.validation, **changes)))


def test_the_valid_score_is_that_of_a_naive_loop_over_the_drawn_users(full: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model = full.model
    users = model.valid_users()
    assert len({*users}) == len(users) == 20 and 0 < valid_score(model) < 1
    assert valid_score(model) == pytest.approx(naive_score(model, users, 5), abs=1e-4)
    assert valid_score(model) == pytest.approx(full.trainer.best_valid_result["ndcg@5"], abs=1e-4)
    with_validation(full, monkeypatch, users=10**6)
    assert sorted(model.valid_users()) == [*range(1, 61)]
    assert valid_score(model) == pytest.approx(naive_score(model, [*range(1, 61)], 5), abs=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_among_items_of_one_vector_a_target_is_at_chance_and_padding_is_no_item(
    full: Made, monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    """Its rank is one of those left by the history, also where the padding item's score of zero is above all of theirs."""
    model, matrix = full.model, full.model.item_matrix
    same = torch.cat([matrix[:1], sign * matrix[1:2].expand(40, -1)])
    left = [41 - len(model.parts.histories.items[user][:-1]) for user in model.valid_users()]

    def score(matrix: Tensor) -> float:
        return model.valid_score(lambda histories: same[1:2].expand(len(histories), -1), matrix)

    with_validation(full, monkeypatch, metric="hit@20", users=60)
    assert score(same) == pytest.approx(sum(20 / number for number in left) / 20, abs=0.2)  # three standard deviations
    with_validation(full, monkeypatch, metric="hit@39")
    assert score(same) == 1
    assert math.isnan(score(torch.full_like(matrix, torch.nan)))


def test_a_nan_of_an_item_that_is_no_target_is_not_passed_over(full: Made) -> None:
    model = full.model
    targets = {model.parts.histories.target(user, "valid") for user in model.valid_users()}
    matrix = model.item_matrix.clone()
    matrix[min({*range(1, 41)} - targets)] = torch.nan
    assert math.isnan(valid_score(model, matrix))


def test_test_items_play_no_part_in_the_valid_score_and_validation_items_do(full: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, before = full.model.parts.histories, valid_score(full.model)
    for place, same in ((-1, True), (-2, False)):
        changed = [items.copy() for items in histories.items]
        for items in changed[1:]:
            items[place] = items[place] % 40 + 1
        with monkeypatch.context() as patch:
            patch.setitem(vars(histories), "items", changed)
            assert (valid_score(full.model) == before) == same


# -- variants ----------------------------------------------------------------------------------------------------------


def test_the_collaborative_models_row_has_its_own_scores(full: Made, listed: Made) -> None:
    model, variants = full.model, full.model.variants()
    assert [*variants] == ["Laser", "SASRec"]
    row = variants["SASRec"]
    with torch.no_grad():
        plain = model.cf.model.full_sort_predict(full.interaction)
    close(row.score_catalogue(full.interaction), plain)
    close(row.score(full.interaction, listed.candidates), plain.gather(1, listed.candidates))
    assert not torch.allclose(plain, model.full_sort_predict(full.interaction), atol=1e-2)
