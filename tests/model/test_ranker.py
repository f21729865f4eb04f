"""The contract of rankers: scores are the LM's own and depend on a user's history and candidates alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data import negatives
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.evaluation.full_ranking import RandomTies, mask, rerank
from recbole_llm.llm.lora import attach_lora
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.parts import Validation, histories_of


@pytest.fixture(scope="module")
def made(module_settings, assemble) -> SimpleNamespace:
    """A ranker whose adapter is not the identity."""
    found = assemble("TALLRec", module_settings)
    found.causal = found.model.parts.backbone.load(found.trainer.cache)
    found.lm = attach_lora(found.causal.model, name="random", r=4, lora_alpha=8, lora_dropout=0.0, seed=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found.likelihood = found.model.parts.likelihood(found.causal).with_lm(found.lm)
    found.model._variants = {"TALLRec": found.model.variant(found.likelihood)}
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
def test_scores_are_the_naive_scorers(made, batch, strategy):
    likelihood = replace(made.likelihood, scorer=replace(made.likelihood.scorer, strategy=strategy))
    with torch.no_grad():
        found = made.model.variant(likelihood).score(batch.interaction, batch.candidates)
    assert found.dtype == torch.float32 and found.shape == batch.candidates.shape and torch.isfinite(found).all()
    builder = made.model.parts.builder(made.causal.tokenizer)
    prompts = [builder.prompt(history) for history in histories_of(made.model, batch.interaction)]
    answers = [[builder.answers[item] for item in row] for row in batch.candidates.tolist()]
    with torch.no_grad():
        close(found, Scorer("naive", pad_token_id=made.causal.tokenizer.pad_token_id)(made.lm, prompts, answers))
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
    before = [made.model.parts.histories.before(user, "test").tolist() for user in users]
    assert histories_of(made.model, batch.interaction) == before


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
    one = made.likelihood([history], batch.candidates[:1])
    close(one, made.likelihood([[9, *history[1:]]], batch.candidates[:1]))
    assert not torch.allclose(one, made.likelihood([[*history[:5], 9]], batch.candidates[:1]))


def test_a_retriever_of_longer_histories_than_the_rows_it_ranks_by_is_refused(settings, assemble):
    full = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "MAX_ITEM_LIST_LENGTH": 5}
    with pytest.raises(ValueError, match="SASRec reads 20 items of a history, .* to 5; give --MAX_ITEM_LIST_LENGTH=20"):
        assemble("TALLRec", settings, **full, retriever_config={"MAX_ITEM_LIST_LENGTH": 20})
    assemble("TALLRec", settings, **full, retriever_config={"MAX_ITEM_LIST_LENGTH": 3})


@torch.no_grad()
def test_a_full_ranking_is_the_retrievers_with_its_top_in_the_llms_order(module_settings, assemble, batch):
    found = assemble(
        "TALLRec",
        module_settings,
        eval_args={"mode": {"valid": "candidates", "test": "full"}},
        retriever_top=5,
        retriever_config={"epochs": 1},
    )
    model, cache = found.model, found.trainer.cache
    model.retriever.load(cache.run(model.retriever.stage))
    variant = model.variant(model.parts.likelihood(model.parts.backbone.load(cache)))
    assert variant.reranked == 5
    retrieved = variant.score_catalogue(batch.interaction)
    assert torch.equal(retrieved, model.retriever.scores(batch.interaction))
    users, ties = batch.interaction["user_id"], RandomTies(model.parts.histories.user_ids, model.parts.histories.item_ids)
    _, ranked = rerank(mask(retrieved, None), batch.interaction, users, variant.score, 5, ties)
    assert ranked.shape == retrieved.shape == (7, 41) and (ranked[:, 0] == -torch.inf).all()
    retrieved[:, 0] = -torch.inf
    order, before = ranked.argsort(descending=True, stable=True), retrieved.argsort(descending=True, stable=True)
    assert torch.equal(order[:, 5:], before[:, 5:])  # the seam: below it nothing moves
    assert torch.equal(order[:, :5].sort().values, before[:, :5].sort().values)
    by_llm = variant.score(batch.interaction, order[:, :5])
    assert (by_llm.diff(dim=1) <= 0).all() and not torch.equal(order, before)


def test_no_stage_reads_more_of_a_history_than_the_test(module_settings, assemble):
    found = assemble("TALLRec", module_settings, max_history=20, MAX_ITEM_LIST_LENGTH=6)
    assert found.model.parts.prompts.max_history == 6
    assert assemble("TALLRec", module_settings, max_history=4, MAX_ITEM_LIST_LENGTH=6).model.parts.prompts.max_history == 4


def test_a_full_ranking_of_the_validation_items_is_refused_with_what_to_give(module_settings, assemble):
    message = "eval_args: .*there are no candidates for valid.*give eval_args: .*'valid': 'candidates', 'test': 'full'"
    with pytest.raises(ValueError, match=message):
        assemble("TALLRec", module_settings, eval_args={"mode": "full"})


# -- training examples -----------------------------------------------------------------------------------------------------


def test_the_domain_holds_training_interactions_only(made):
    whole, trained = made.model.parts.histories.items[1:], made.model.parts.domain.histories
    assert len(whole) == len(trained) == 60
    assert all(np.array_equal(train, items[:-2]) for items, train in zip(whole, trained, strict=True))


LISTWISE = {"prompt": "listwise", "lora_train_mode": "prefix", "top_k_target": 2, "train_samples": 64, "lora_epochs": 1}


@pytest.mark.parametrize("changes", [{"train_samples": None}, LISTWISE], ids=["history", "listwise"])
def test_no_validation_or_test_item_is_ever_an_answer(module_settings, assemble, monkeypatch, changes, tmp_path):
    made = assemble("TALLRec", module_settings, checkpoint_dir=str(tmp_path), **changes)
    histories, encoded, encode = made.model.parts.histories, [], ExampleEncoder.__call__

    def spy(self, items, rng, **given):
        encoded.append(items)
        return encode(self, items, rng, **given)

    monkeypatch.setattr(ExampleEncoder, "__call__", spy)
    made.trainer.fit(made.train, made.valid)
    pairs = {(int(a), int(b)) for user in histories.items[1:] for a, b in zip(user[:-2], user[1:-2], strict=False)}
    assert len(encoded) > 60
    assert all((a, b) in pairs for items in encoded for a, b in zip(items, items[1:], strict=False))


def test_listed_candidates_hold_the_target_once_at_any_place_and_nothing_known():
    rng = np.random.default_rng(0)
    rows = [negatives.with_target(rng, 7, {7, 1, 2}, np.arange(1, 40), 9) for _ in range(500)]
    assert all(len(set(row)) == 10 and row.count(7) == 1 and not {0, 1, 2} & set(row) for row in rows)
    places = np.bincount([row.index(7) for row in rows], minlength=10)
    assert places.min() > 25  # 50 expected
    assert {item for row in rows for item in row} == set(range(3, 40))


def test_a_catalogue_too_small_to_list_from_is_an_error_and_not_an_endless_search():
    with pytest.raises(ValueError, match="candidates.num_negatives: 9 .* leaves 8 of the 11 items"):
        negatives.with_target(np.random.default_rng(0), 3, {1, 2, 3}, np.arange(1, 12), 9)


@pytest.mark.parametrize(
    ("metric", "of_rank"),
    [
        ("ndcg", lambda rank: 1 / np.log2(1 + rank)),
        ("ndcg@5", lambda rank: (rank <= 5) / np.log2(1 + rank)),
        ("hit@3", lambda rank: 1.0 * (rank <= 3)),
        ("mrr", lambda rank: 1 / rank),
    ],
)
def test_the_stopping_score_is_the_valid_metric_of_the_validation_targets(made, metric, of_rank):
    users = replace(made.model.parts, validation=Validation(metric, 20, True)).eval_users(made.candidates)
    _, _, candidates, targets = users.draw(20)
    perfect = (candidates == targets[:, None]).float()
    assert users.score(lambda *_: perfect) == 1.0
    assert users.score(lambda *_: -perfect) == pytest.approx(of_rank(10))
    slots = perfect.argmax(1).numpy()  # equal scores rank in the order of their slots, which are drawn
    assert users.score(lambda *_: 0 * perfect) == pytest.approx(np.mean(of_rank(slots + 1))) and len({*slots}) > 3
    assert np.isnan(users.score(lambda *_: perfect / 0))


def test_the_stopping_score_is_of_drawn_users_with_their_histories_before_validation(made):
    eval_users, calls = made.model.parts.eval_users(made.candidates), []

    def spy(*arguments):
        calls.append(arguments)
        return torch.zeros(len(arguments[1]), 10)

    eval_users.score(spy)
    ((histories, candidates, users),) = calls
    drawn, known = eval_users.draw(20), made.model.parts.histories  # valid_users: 20
    assert users == drawn.users and len({*users}) == 20 and users != sorted(users)
    assert histories == [known.items[user][:-2].tolist() for user in users]
    targets = torch.tensor([known.target(user, "valid") for user in users])
    assert torch.equal(targets, drawn.targets) and (candidates == targets[:, None]).any(1).all()
    assert eval_users.draw(7).users == users[:7]


def test_an_adapter_is_trained_anew_for_whatever_changes_it_and_for_nothing_else(made, module_settings, assemble):
    def fingerprint(**changes) -> str:
        found = assemble("TALLRec", module_settings, **changes)
        return found.model.plan(found.candidates)[0].fingerprint

    result = {"r": 8}, {"seed": 1}, {"lora_epochs": 5}, {"max_history": 4}, {"noun": "film"}, {"dtype": "bfloat16"}
    stopping = {"valid_users": 9}, {"normalize": "mean"}, {"candidates": {"num_negatives": 8}}, {"valid_metric": "MRR@5"}
    found = [fingerprint(**changes) for changes in ({}, *result, *stopping)]
    assert len(set(found)) == len(found)
    nothing = {
        "eval_batch_size": 9,
        "save_every_seconds": 9,
        "train_batch_tokens": 64,
        "gradient_checkpointing": True,
        "max_memory": {"cpu": "2GB"},
        "scorer": "naive",
        "metrics": ["NDCG"],
        "topk": [5, 10],
    }
    assert fingerprint(**nothing) == found[0]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "listwize"}, "prompt: listwize is not a key of `prompts`"),
        ({"lora_train_mode": "whole"}, "lora_train_mode: 'whole' in config_dict is not one of prefix, sequence"),
        ({"scorer": "best"}, "scorer: 'best' in config_dict is not one of tree, prefix, label, naive"),
        ({"normalize": "max"}, "normalize: 'max' in config_dict is not one of sum, mean, pmi"),
        (
            {"metrics": ["GAUC"], "valid_metric": "GAUC"},
            "valid_metric: .* does not follow from a target's rank",
        ),
        ({"prompt": "listwise"}, "lora_train_mode"),
        ({"scorer": "label"}, "lora_train_mode"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(module_settings, assemble, changes, message):
    """Not one of them waits for ``fit``."""
    with pytest.raises(ValueError, match=message):
        assemble("TALLRec", module_settings, **changes)
