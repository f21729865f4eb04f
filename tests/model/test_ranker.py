"""The contract of rankers: scores are the LM's own and depend on a user's history and candidates alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.llm.scoring import Scorer
from recbole_llm.model import ranker


@pytest.fixture(scope="module")
def made(module_settings, assemble) -> SimpleNamespace:
    """A ranker whose adapter is not the identity."""
    found = assemble("TALLRec", module_settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found.model.eval()
    return found


@pytest.fixture(scope="module")
def batch(made) -> SimpleNamespace:
    """Seven users of the test split with their candidates."""
    interaction, _, _, targets = next(iter(made.test))
    users = interaction["user_id"]
    asked = SimpleNamespace(interaction=interaction[:7], candidates=made.test.candidates.lookup(users[:7], targets[:7]))
    assert len(set(asked.interaction["item_length"].tolist())) > 1  # so that there is padding
    return asked


@torch.no_grad()
def scores(made, interaction, candidates):
    return made.model.score_candidates(interaction, candidates)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["tree", "prefix"])
def test_scores_are_the_naive_scorers(made, batch, strategy, monkeypatch):
    monkeypatch.setattr(made.model, "scorer", replace(made.model.scorer, strategy=strategy))
    found = scores(made, batch.interaction, batch.candidates)
    assert found.dtype == torch.float32 and found.shape == batch.candidates.shape and torch.isfinite(found).all()
    prompts = [made.model.prompts.prompt(history) for history in made.model._histories_of(batch.interaction)]
    answers = [[made.model.prompts.answers[item] for item in row] for row in batch.candidates.tolist()]
    with torch.no_grad():
        close(found, Scorer("naive", pad_token_id=made.model.pad_token_id)(made.model.lm, prompts, answers))
    assert found.std(1).min() > 0.1  # not the same for everything


def test_permuted_candidates_have_permuted_scores(made, batch):
    order = torch.randperm(batch.candidates.size(1), generator=torch.Generator().manual_seed(0))
    permuted = scores(made, batch.interaction, batch.candidates[:, order])
    close(permuted, scores(made, batch.interaction, batch.candidates)[:, order])


def test_a_users_scores_do_not_depend_on_the_others_of_the_batch(made, batch):
    together = scores(made, batch.interaction, batch.candidates)
    alone = torch.cat([scores(made, batch.interaction[i : i + 1], batch.candidates[i : i + 1]) for i in range(7)])
    close(alone, together)


def test_an_interaction_holds_the_users_whole_history_and_no_padding(made, batch):
    users = batch.interaction["user_id"].tolist()
    before = [made.model.histories.before(user, "test").tolist() for user in users]
    assert made.model._histories_of(batch.interaction) == before


def test_scores_do_not_depend_on_padding(made, batch):
    fields = dict(batch.interaction.interaction)
    fields["item_id_list"] = torch.nn.functional.pad(fields["item_id_list"], (0, 3))
    close(scores(made, Interaction(fields), batch.candidates), scores(made, batch.interaction, batch.candidates))


def test_predict_is_the_score_of_one_candidate(made, batch):
    fields = dict(batch.interaction.interaction) | {"item_id": batch.candidates[:, 0]}
    with torch.no_grad():
        one = made.model.predict(Interaction(fields))
    assert one.shape == (7,)
    close(one, scores(made, batch.interaction, batch.candidates)[:, 0])


def test_only_the_recent_history_is_read(made, batch):
    history = [1, 2, 3, 4, 5, 6]  # max_history is 5
    one = made.model.score_histories([history], batch.candidates[:1])
    close(one, made.model.score_histories([[9, *history[1:]]], batch.candidates[:1]))
    assert not torch.allclose(one, made.model.score_histories([[*history[:5], 9]], batch.candidates[:1]))


@torch.no_grad()
def test_a_full_ranking_is_the_retrievers_with_its_top_in_the_llms_order(module_settings, assemble, batch):
    found = assemble(
        "TALLRec",
        module_settings,
        eval_args={"mode": {"valid": "candidates", "test": "full"}},
        retriever_top=5,
        retriever_config={"epochs": 1},
    )
    ranked, retrieved = (
        found.model.full_sort_predict(batch.interaction),
        found.model.retriever.scores(batch.interaction),
    )
    assert ranked.shape == retrieved.shape == (7, 41) and (ranked[:, 0] == -torch.inf).all()
    retrieved[:, 0] = -torch.inf
    order, before = ranked.argsort(descending=True, stable=True), retrieved.argsort(descending=True, stable=True)
    assert torch.equal(order[:, 5:], before[:, 5:])  # the seam: below it nothing moves
    assert torch.equal(order[:, :5].sort().values, before[:, :5].sort().values)
    by_llm = found.model.score_candidates(batch.interaction, order[:, :5])
    assert (by_llm.diff(dim=1) <= 0).all() and not torch.equal(order, before)


def test_a_full_ranking_of_the_validation_items_is_refused_with_what_to_give(module_settings, assemble):
    with pytest.raises(ValueError, match="eval_args: TALLRec .*'valid': 'candidates', 'test': 'full'"):
        assemble("TALLRec", module_settings, eval_args={"mode": "full"})


# -- training rows -----------------------------------------------------------------------------------------------------


def test_the_domain_holds_training_interactions_only(made):
    whole, trained = made.model.histories.items[1:], made.model.domain.histories
    assert len(whole) == len(trained) == 60
    assert all(np.array_equal(train, items[:-2]) for items, train in zip(whole, trained, strict=True))


LISTWISE = {"prompt": "listwise", "lora_train_mode": "prefix", "top_k_target": 2, "train_samples": 64, "lora_epochs": 1}


@pytest.mark.parametrize("changes", [{"train_samples": None}, LISTWISE], ids=["history", "listwise"])
def test_no_validation_or_test_item_is_ever_an_answer(module_settings, assemble, monkeypatch, changes, tmp_path):
    made = assemble("TALLRec", module_settings, checkpoint_dir=str(tmp_path), **changes)
    histories, encoded = made.model.histories, []
    encode = made.model._row
    monkeypatch.setattr(made.model, "_row", lambda items, *rest: (encoded.append(items), encode(items, *rest))[1])
    made.trainer.fit(made.train, made.valid)
    pairs = {(int(a), int(b)) for user in histories.items[1:] for a, b in zip(user[:-2], user[1:-2], strict=False)}
    assert len(encoded) > 60
    assert all((a, b) in pairs for items in encoded for a, b in zip(items, items[1:], strict=False))


def test_listed_candidates_hold_the_target_once_at_any_place_and_nothing_known():
    rng = np.random.default_rng(0)
    rows = [ranker._listed(7, {7, 1, 2}, np.arange(1, 40), 9, rng) for _ in range(500)]
    assert all(len(set(row)) == 10 and row.count(7) == 1 and not {0, 1, 2} & set(row) for row in rows)
    places = np.bincount([row.index(7) for row in rows], minlength=10)
    assert places.min() > 25  # 50 expected
    assert {item for row in rows for item in row} == set(range(3, 40))


def test_a_catalogue_too_small_to_list_from_is_an_error_and_not_an_endless_search():
    with pytest.raises(ValueError, match="candidates.num_negatives: 9 .* leaves 8 of the 11 items"):
        ranker._listed(3, {1, 2, 3}, np.arange(1, 12), 9, np.random.default_rng(0))


def test_the_stopping_score_is_the_ndcg_of_the_validation_targets(made, monkeypatch):
    users = made.model.asked["valid"]
    _, _, candidates, targets = users.draw(20)
    perfect = (candidates == targets[:, None]).float()
    monkeypatch.setattr(made.model, "score_histories", lambda histories, rows, users: perfect)
    assert users.score() == 1.0
    monkeypatch.setattr(made.model, "score_histories", lambda histories, rows, users: -perfect)
    assert users.score() == pytest.approx(1 / np.log2(11))
    monkeypatch.setattr(made.model, "score_histories", lambda histories, rows, users: 0 * perfect)
    assert users.score() == pytest.approx(1 / np.log2(2 + 4.5))  # ties count half, so a constant is at chance
    monkeypatch.setattr(made.model, "score_histories", lambda histories, rows, users: perfect / 0)
    assert np.isnan(users.score())


def test_the_stopping_score_asks_about_drawn_users_with_what_they_did_before(made, monkeypatch):
    asked = []

    def spy(*arguments):
        asked.append(arguments)
        return torch.zeros(len(arguments[1]), 10)

    monkeypatch.setattr(made.model, "score_histories", spy)
    made.model.asked["valid"].score()
    ((histories, candidates, users),) = asked
    drawn = made.model.asked["valid"].draw(20)  # valid_users
    assert users == drawn.users and len({*users}) == 20 and users != sorted(users)
    assert histories == [made.model.histories.items[user][:-2].tolist() for user in users]
    targets = torch.tensor([made.model.histories.target(user, "valid") for user in users])
    assert torch.equal(targets, drawn.targets) and (candidates == targets[:, None]).any(1).all()
    assert made.model.asked["valid"].draw(7).users == users[:7]


def test_an_adapter_is_trained_anew_for_whatever_changes_it_and_for_nothing_else(made, module_settings, assemble):
    def fingerprint(**changes) -> str:
        model = assemble("TALLRec", module_settings, **changes).model
        return model.lora_stage("ingredient", [model.domain]).fingerprint

    result = {"r": 8}, {"seed": 1}, {"lora_epochs": 5}, {"max_history": 4}, {"noun": "film"}, {"dtype": "bfloat16"}
    stopping = {"valid_users": 9}, {"normalize": "mean"}, {"candidates": {"num_negatives": 8}}
    found = [fingerprint(**changes) for changes in ({}, *result, *stopping)]
    assert len(set(found)) == len(found)
    nothing = {
        "eval_batch_size": 9,
        "save_every_seconds": 9,
        "scorer": "naive",
        "metrics": ["Hit"],
        "valid_metric": "Hit@1",
    }
    assert fingerprint(**nothing) == found[0]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "listwize"}, "prompt: listwize is not a key of `prompts`"),
        ({"lora_train_mode": "whole"}, "lora_train_mode: whole is neither prefix nor sequence"),
        ({"scorer": "best"}, "scorer strategy 'best' is unknown"),
        ({"prompt": "listwise"}, "lora_train_mode"),
        ({"scorer": "label"}, "lora_train_mode"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(module_settings, assemble, changes, message):
    with pytest.raises(ValueError, match=message):
        assemble("TALLRec", module_settings, **changes)
