"""States, items and scores of a model as a part are RecBole's own, at the end of a history and at each of its items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.classical import collaborative
from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.classical.sequence import sequence_states
from recbole_llm.config import LLMConfig
from tests.classical.collaborative.conftest import GENERAL, SEQUENTIAL, SMALL, Make, asked, close

# -- states, items, scores ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, "BPR", "LightGCN", "NGCF", "SGL"])
def test_states_times_items_are_recboles_own_scores(make: Make, name: str) -> None:
    cf = make(name)
    interaction, users, histories = asked(cf)
    states, items = cf.user_states(users, histories), cf.item_table
    assert items.shape == (41, states.shape[1]) and len({*map(tuple, states.tolist())}) > 30
    bias = getattr(cf.model, "output_bias", 0)  # of BERT4Rec
    own = cf.model.full_sort_predict(interaction).view(len(users), -1)
    torch.testing.assert_close(states @ items.T + bias, own, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_a_state_is_what_the_forward_gives_for_the_padded_history(make: Make, name: str) -> None:
    cf = make(name)
    padded = torch.tensor([[3, 1, 4, *[0] * 47], [15, 9, *[0] * 48]])
    close(cf.user_states([1, 2], [[3, 1, 4], [15, 9]]), cf.model(padded, torch.tensor([3, 2])))


@torch.no_grad()
def test_nextitnet_is_read_as_it_was_trained_at_the_last_item_wherever_the_padding_ends(make: Make) -> None:
    cf, history = make("NextItNet"), [3, 1, 4, 15, 9]
    padded = torch.tensor([[*history, *[0] * 45]])
    every = sequence_states(cf.model, padded, torch.tensor([5]))  # [1, L, H]
    close(cf.user_states([1], [history]), every[:, 4])
    close(cf.user_states([1], [history[:3]]), every[:, 2])
    assert not torch.allclose(type(cf.model).forward(cf.model, padded), every[:, 4])  # RecBole's: of a padded column


@torch.no_grad()
def test_bert4recs_state_is_that_of_the_mask_behind_the_history(make: Make) -> None:
    cf = make("BERT4Rec")
    masked = torch.tensor([[1, 4, 41, *[0] * 47]])  # RecBole drops the oldest column to make room for the mask
    close(cf.user_states([1], [[3, 1, 4]]), cf.model(masked)[:, 2])


@torch.no_grad()
def test_users_and_items_of_models_without_histories_are_their_tables(make: Make) -> None:
    bpr, neumf, lightgcn = map(make, GENERAL)
    users, histories = [5, 2, 5], [[1, 2], [], [3]]
    close(bpr.user_states(users, histories), bpr.model.user_embedding.weight[users])
    close(bpr.item_table, bpr.model.item_embedding.weight)
    model = neumf.model
    both = torch.cat([model.user_mf_embedding.weight, model.user_mlp_embedding.weight], 1)
    close(neumf.user_states(users, histories), both[users])
    close(neumf.item_table, torch.cat([model.item_mf_embedding.weight, model.item_mlp_embedding.weight], 1))
    people, things = lightgcn.model()  # after the graph, not the tables
    close(lightgcn.user_states(users, histories), people[users])
    close(lightgcn.item_table, things)
    assert not torch.allclose(things, lightgcn.model.item_embedding.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_user_without_history_has_a_state_of_zeros_and_disturbs_nobody(make: Make, name: str) -> None:
    cf = make(name)
    states = cf.user_states([1, 2, 3], [[3, 1], [], [4]])
    assert torch.isfinite(states).all() and not states[1].any() and states[[0, 2]].abs().sum(1).min() > 0
    close(states[[0, 2]], cf.user_states([1, 3], [[3, 1], [4]]))


@torch.no_grad()
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_of_a_long_history_the_last_items_are_read(make: Make, name: str) -> None:
    cf, recent = make(name, MAX_ITEM_LIST_LENGTH=5), [7, 8, 9, 10, 11]
    states = cf.user_states([1, 1, 1], [[1, 2, 3, *recent], recent, recent[1:]])
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2])


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_candidate_scores_are_the_models_own(make: Make, name: str) -> None:
    cf = make(name)
    interaction, users, histories = asked(cf)
    candidates = torch.randint(1, 41, (len(users), 6), generator=torch.Generator().manual_seed(0))
    found = cf.candidate_scores(users, histories, candidates)
    if name == "NeuMF":  # it has no full ranking
        own = torch.stack(
            [cf.model.predict(Interaction({"user_id": interaction["user_id"], "item_id": column})) for column in candidates.T],
            dim=1,
        )
    else:
        own = cf.model.full_sort_predict(interaction).view(len(users), -1).gather(1, candidates)
    assert found.shape == candidates.shape and found.std() > 0
    close(found, own)


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_the_catalogue_is_ranked_for_another_models_interaction_of_longer_histories(make: Make, name: str) -> None:
    short, (interaction, users, histories) = make(name, MAX_ITEM_LIST_LENGTH=5), asked(make("SASRec"))
    assert interaction["item_id_list"].shape[1] == 50 and max(map(len, histories)) > 5
    scores = short.scores(interaction)  # [B, I]
    assert scores.shape == (len(users), 41)
    everything = torch.arange(41).expand(len(users), -1)
    close(scores, short.candidate_scores(users, [history[-5:] for history in histories], everything))


@pytest.mark.parametrize("name", [*SEQUENTIAL, *GENERAL])
def test_in_another_process_it_answers_as_where_it_was_trained(make: Make, shared_settings: dict[str, Any], name: str) -> None:
    trained = make(name)
    interaction, users, histories = asked(trained)
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), name, SMALL)
    again.load(trained.folder)  # type: ignore[attr-defined]
    assert torch.equal(again.user_states(users, histories), trained.user_states(users, histories))
    assert torch.equal(again.item_table, trained.item_table)
    assert torch.equal(again.scores(interaction), trained.scores(interaction))


# -- states at every item ----------------------------------------------------------------------------------------------

SEEN = [[3, 1, 4, 15, 9], [7], [], [2, 6]]
BY_PREFIX = ["STAMP", "LightSANs"]  # LightSANs mixes all columns: it is read at its full length or not at all
AS_RECBOLE = {"train_mode": "prefix"}  # its NextItNet reads the padding


@pytest.mark.parametrize(
    ("name", "values"), [(name, {}) for name in ["SASRec", "GRU4Rec", "NextItNet", *BY_PREFIX]] + [("NextItNet", AS_RECBOLE)]
)
def test_the_state_at_an_item_is_the_user_state_after_it(
    make: Make, name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collaborative, "PREFIXES", 3)
    cf = make(name, **values)
    states, known = cf.sequence_states(SEEN)  # [B, N, H], [B, N]
    assert known.tolist() == [[place < len(history) for place in range(5)] for history in SEEN]
    assert states.shape == (4, 5, cf.state_width) and not states[~known].any() and not states.requires_grad
    prefixes = [history[: end + 1] for history in SEEN for end in range(len(history))]
    close(states[known], cf.user_states([1] * len(prefixes), prefixes))
    assert len({*map(tuple, states[known].tolist())}) == len(prefixes)


@torch.no_grad()
def test_bert4rec_sees_the_whole_history_from_each_of_its_items(make: Make) -> None:
    cf = make("BERT4Rec")
    states, known = cf.sequence_states(SEEN)
    assert known.sum(1).tolist() == [5, 1, 0, 2] and not states[~known].any() and cf.state_width == 16
    for row, history in zip(states, SEEN, strict=True):
        padded = torch.tensor([[*history, *[0] * (50 - len(history))]])
        close(row[: len(history)], cf.model(padded)[0, : len(history)])
    shorter, _ = cf.sequence_states([SEEN[0][:4]])
    assert not torch.allclose(states[0, :4], shorter[0], atol=1e-3)


@pytest.mark.parametrize("name", GENERAL)
def test_without_a_history_of_its_own_a_model_has_the_items_vectors_there(make: Make, name: str) -> None:
    cf, long = make(name, MAX_ITEM_LIST_LENGTH=4), [3, 1, 4, 15, 9]
    states, known = cf.sequence_states([long, [], [7]])
    close(states[0], cf.item_table[long])
    close(states[2, 0], cf.item_table[7])
    assert known.sum(1).tolist() == [5, 0, 1] and not states[~known].any()
    assert cf.state_width == states.shape[-1] == cf.item_table.shape[1]


@pytest.mark.parametrize("name", [*SEQUENTIAL, *BY_PREFIX, "BPR"])
def test_a_row_of_states_is_the_same_in_any_company(make: Make, name: str) -> None:
    cf = make(name)
    states, _ = cf.sequence_states([*SEEN, list(range(1, 41))])
    for row, history in zip(states, SEEN, strict=False):
        alone, known = cf.sequence_states([np.array(history, dtype=int)])  # an empty one has one column of padding
        assert alone.shape == (1, max(len(history), 1), cf.state_width) and known.sum() == len(history)
        close(alone[0, : len(history)], row[: len(history)])
    nothing, known = cf.sequence_states([[], []])
    assert nothing.shape == (2, 1, cf.state_width) and not nothing.any() and not known.any()


@pytest.mark.parametrize("name", [*SEQUENTIAL, *BY_PREFIX])
def test_of_a_long_history_the_states_are_those_of_its_last_items(make: Make, name: str) -> None:
    cf, recent = make(name, MAX_ITEM_LIST_LENGTH=5), [7, 8, 9, 10, 11]
    states, known = cf.sequence_states([[1, 2, 3, *recent], recent, recent[1:]])
    assert states.shape[1] == 5 and known.sum(1).tolist() == [5, 5, 4]
    close(states[0], states[1])
    assert not torch.allclose(states[0, 1:], states[2, :4])


@pytest.mark.parametrize(("name", "read"), [*((name, [(4, 5)]) for name in SEQUENTIAL), ("STAMP", [(9, 50)])])
def test_one_pass_over_no_more_than_the_longest_history_where_that_is_enough(
    make: Make, name: str, read: list[tuple[int, ...]]
) -> None:
    cf, passes = make(name), []
    hook = cf.model.item_embedding.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    cf.sequence_states(SEEN)
    hook.remove()
    assert passes == read


def test_the_items_are_those_of_the_weights_that_were_loaded(make: Make, shared_settings: dict[str, Any]) -> None:
    trained = make("LightGCN")
    again = CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), "LightGCN", SMALL)
    assert not torch.allclose(again.item_table, trained.item_table)  # asked before its stage is there
    again.load(trained.folder)  # type: ignore[attr-defined]
    assert torch.equal(again.item_table, trained.item_table)
    assert torch.equal(again.sequence_states([[3]])[0], trained.sequence_states([[3]])[0])
