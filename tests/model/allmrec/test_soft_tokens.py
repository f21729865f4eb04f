"""Soft tokens stand where the items are and are read there, whatever the titles; the vectors that they are made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.data.prompts import Prompt
from recbole_llm.model.allmrec import LLM_ONLY
from tests.model.allmrec.conftest import LISTWISE, PROMPTS, Made, close, codes, copied, score, scores, with_codes


def row_of(prompt: Prompt) -> list[int]:
    """Token ids, with ``-1 - key`` for a soft token."""
    return [-1 - prompt.soft_slots[place] if place in prompt.soft_slots else token for place, token in enumerate(prompt.ids)]


# -- soft tokens -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_are_those_of_a_plain_forward_over_embeddings_put_together_by_hand(trained: Any, prompt: str) -> None:
    made = trained(**PROMPTS[prompt])
    soft, lm = made.soft, made.causal.model
    embed, found, filled = lm.get_input_embeddings(), scores(made), set()
    for row in (0, 3, 6):
        history, candidates, user = made.histories[row], made.candidates[row].tolist(), made.users[row]
        vectors = []
        for token in row_of(made.builder.prompt(history, candidates, 9998)):
            if token == -9999:
                vectors.append(soft.project_user(made.model.cf.user_states([user], [history]))[0])
            elif token < 0:
                vectors.append(soft.project_item(codes(made)["joint"][-1 - token]))
            else:
                vectors.append(embed.weight[token])
            filled |= {token} if token < 0 else set()
        for item, value in zip(candidates, found[row], strict=True):
            answer = made.builder.answers[item]
            inputs = torch.stack([*vectors, *embed.weight[answer[:-1]]])[None]  # [1, T, D]
            logp = lm(inputs_embeds=inputs).logits[0].log_softmax(-1)
            expected = sum(logp[len(vectors) - 1 + place, token] for place, token in enumerate(answer))
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
    assert len(filled) > 8 and found.std(1).min() > 0.1


def test_the_history_prompt_is_each_title_with_its_token_and_then_the_users(made: Made) -> None:
    tokens = made.causal.tokenizer
    row, history = [tokens.bos_token_id], made.histories[0][-5:]
    for item in history:
        row += tokens(made.model.parts.domain.items.names[item], add_special_tokens=False).input_ids
        row += [-1 - item, *tokens("\n", add_special_tokens=False).input_ids]
    assert row_of(made.builder.prompt(made.histories[0], None, 76)) == [*row, -77]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_scorer_gives_the_same_scores(trained: Any, prompt: str) -> None:
    made, found = trained(**PROMPTS[prompt]), {}
    for strategy, budget in (("naive", 9999), ("prefix", 700), ("tree", 700)):
        scorer = replace(made.likelihood.scorer, strategy=strategy, batch_tokens=budget)
        with torch.no_grad():
            likelihood = replace(made.likelihood, scorer=scorer)
            found[strategy] = likelihood(made.histories, made.candidates, made.users)
    close(found["prefix"], found["naive"])
    close(found["tree"], found["naive"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_permuted_users_have_permuted_scores(trained: Any, prompt: str) -> None:
    made, order = trained(**PROMPTS[prompt]), [4, 0, 6, 2, 1, 5, 3]
    moved = [[values[i] for i in order] for values in (made.histories, made.users)]
    close(score(made, moved[0], made.candidates[order], moved[1]), scores(made)[order])
    close(score(made, made.histories * 2, made.candidates.repeat(2, 1), made.users * 2), scores(made).repeat(2, 1))


def test_a_users_token_is_read_and_so_is_an_items(made: Made) -> None:
    """The collaborative model reads what the prompt has no room for: a change of the oldest item changes the state."""
    long = [3, 1, 4, 15, 9, 2, 6, 5]  # max_history is 5
    same_prompt = score(made, [long, [30, *long[1:]]], made.candidates[:1].expand(2, -1), [1, 1])
    assert not torch.allclose(same_prompt[0], same_prompt[1], atol=1e-3)
    last, changed = made.histories[0][-1], codes(made)["joint"].clone()
    close(score(with_codes(made, changed)), scores(made))
    changed[last] = 1 - changed[last]
    assert (score(with_codes(made, changed))[0] - scores(made)[0]).abs().max() > 1e-3


def test_without_any_soft_token_there_is_nothing_to_train(assemble: Any, shared_settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="user_representation and joint_embedding: without both there is no soft token to train"):
        assemble("ALLMRec", shared_settings, joint_embedding=False, user_representation=False)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("joint", "user"), [(True, False), (False, True)])
def test_a_part_that_is_left_out_has_no_tokens(
    assemble: Any, shared_settings: dict[str, Any], trained: Any, prompt: str, joint: bool, user: bool
) -> None:
    changes = {**PROMPTS[prompt], "joint_embedding": joint, "user_representation": user}
    made, other = trained(**PROMPTS[prompt]), assemble("ALLMRec", shared_settings, **changes)
    model, n_items, tokenizer = other.model, made.model.n_items, made.causal.tokenizer
    shown = made.histories[0], made.candidates[0].tolist()
    found = model.parts.builder(tokenizer).prompt(*shown, n_items)
    keys = [*found.soft_slots.values()]
    assert (n_items in keys) == user and bool([item for item in keys if item < n_items]) == joint
    soft = model.projection.soft_tokens(other.trainer.cache, made.causal)
    (numbered,), table = soft.fill([found], [(made.users[0], made.histories[0])])
    assert (table is None) == (not keys) and {*numbered.soft_slots.values()} == {*range(len({*keys}))}
    if not keys:
        assert numbered == found == model.parts.builder(tokenizer, prompts=model.plain_prompts).prompt(*shown)


def test_tokens_are_numbered_once_each_and_point_to_their_vectors(made: Made) -> None:
    model, n_items = made.model, made.model.n_items
    rows = [Prompt([5, 0, 6, 0, 0], {1: 9, 3: 3, 4: n_items}), Prompt([0, 7, 0], {0: 9, 2: n_items + 1})]
    before, asking = copy.deepcopy(rows), [(1, [9, 3]), (2, [9])]
    with torch.no_grad():
        numbered, table = made.soft.fill(rows, asking)
        items = made.soft.project_item(codes(made)["joint"][[3, 9]])
        users = made.soft.project_user(model.cf.user_states([1, 2], [[9, 3], [9]]))
    assert [prompt.soft_slots for prompt in numbered] == [{1: 1, 3: 0, 4: 2}, {0: 1, 2: 3}]
    assert [prompt.ids for prompt in numbered] == [[5, 0, 6, 0, 0], [0, 7, 0]] and rows == before
    torch.testing.assert_close(table, torch.cat([items, users]))


@pytest.mark.slow
@pytest.mark.parametrize("title", ["[HistoryEmb]", "{user}", "a || b", "<s> </s>"])
def test_hostile_titles_are_scored_as_any_other(
    settings: dict[str, Any], data_path: Path, assemble: Any, tmp_path: Path, title: str
) -> None:
    """The slots of a run whose titles spell markers are those of the run on harmless titles."""
    found = []
    for index, words in enumerate((title, "harmless")):
        path = copied(data_path, tmp_path / str(index), item=lambda text, words=words: text.replace("The ", f"{words} "))
        made = assemble("ALLMRec", {**settings, **LISTWISE, "max_prompt_tokens": 480}, data_path=str(path))
        assert words in made.model.parts.domain.items.names[1]
        builder = made.model.parts.builder(made.model.parts.backbone.tokenizer)
        found.append([*builder.prompt([1, 2, 3], [4, 5], 98).soft_slots.values()])
        result = made.trainer.fit(made.train, made.valid)[1]
        assert all(0 <= value <= 1 for value in result.values())
    assert found[0] == found[1] == [98, 1, 2, 3, 4, 5]


# -- item vectors ------------------------------------------------------------------------------------------------------


def test_cold_items_are_those_with_too_few_training_interactions_and_take_their_text(trained: Any) -> None:
    for threshold in (0, 1, 9):
        made = trained(cold_threshold=threshold)
        met = np.zeros(made.model.n_items, dtype=int)
        for history in made.model.parts.histories.items[1:]:
            for item in history[:-2]:  # neither the validation nor the test item counts
                met[item] += 1
        cold, found = met < threshold, codes(made)
        assert not torch.equal(found["text"], found["joint"])
        for item, code in enumerate(made.soft._codes):
            assert torch.equal(code, found["text" if cold[item] else "joint"][item])
        assert cold.sum() == {0: 0, 1: 1}.get(threshold, cold.sum())  # padding alone is below 1 here
    assert 5 < cold.sum() < 35


@torch.no_grad()
def test_a_colder_threshold_changes_the_scores_of_prompts_with_such_items_alone(trained: Any) -> None:
    made, colder = trained(), trained(cold_threshold=9)
    warm = [item for item in range(1, made.model.n_items) if colder.model.parts.histories.train_counts[item] >= 9]
    cold = [item for item in range(1, made.model.n_items) if item not in warm]
    given = [warm[:3], [*warm[:2], cold[0]]], made.candidates[:2], [1, 1]
    before, after = made.likelihood(*given), with_codes(made, colder.soft._codes).likelihood(*given)
    close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_random_vectors_depend_on_the_seed_alone(trained: Any, assemble: Any, shared_settings: dict[str, Any]) -> None:
    def item_codes(**changes: Any) -> torch.Tensor:
        made = assemble("ALLMRec", shared_settings, item_vectors="random", **changes)
        made.trainer.cache.run(made.model.projection.alignment)
        return made.model.projection.soft_tokens(made.trainer.cache, made.model.parts.backbone.load(made.trainer.cache))._codes

    made = trained(item_vectors="random")
    first = made.soft._codes
    torch.manual_seed(99)
    state_before = torch.get_rng_state()
    made.model.load(made.trainer.cache)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert torch.equal(item_codes(), first) and not torch.equal(item_codes(seed=1), first)
    assert first.shape == (41, 16) and len({*map(tuple, first.tolist())}) == 41
    assert not torch.equal(scores(made), scores(trained()))


def test_text_vectors_stand_for_every_item(trained: Any) -> None:
    made = trained(item_vectors="text")
    assert torch.equal(made.soft._codes, codes(made)["text"])
    assert not torch.equal(codes(made)["text"], codes(made)["joint"])
    assert list(made.model.variants()) == ["ALLMRec", "SASRec", LLM_ONLY]  # with its text vectors it would be itself
