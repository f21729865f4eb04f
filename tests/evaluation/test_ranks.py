"""Ranks and rows: ties, chance, numbers that are none; and RecBole's metrics computed once more by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction

from recbole_llm.evaluation import ranks
from recbole_llm.evaluation.metrics import metrics
from recbole_llm.evaluation.ranks import Ranks, gather_scores, target_ranks
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import run_recbole_llm

USERS, WIDTH = 7, 5


def ranked(scores: list[list[float]], slots: list[int]) -> Ranks:
    ranks = Ranks()
    ranks.add(torch.arange(1, len(slots) + 1), torch.tensor(scores), torch.tensor(slots))
    return ranks


def test_ranks_count_better_candidates_and_break_ties_by_slot() -> None:
    ranks = ranked([[3, 1, 2], [3, 1, 2], [2, 2, 2], [2, 2, 2], [0, 2, 2]], [0, 1, 0, 2, 2])
    assert ranks.ranks == [1, 3, 1, 3, 2]
    assert ranks.ties == [0, 0, 2, 2, 1]
    assert ranks.tie_rate == 3 / 5
    assert ranks.users == [1, 2, 3, 4, 5]
    assert Ranks().tie_rate == 0


def test_a_missed_target_has_no_rank_at_which_a_longer_list_would_find_it() -> None:
    ranks = Ranks()
    ranks.add(torch.tensor([1, 2]), torch.ones(2, 3), torch.tensor([0, 0]), missed=torch.tensor([False, True]))
    assert (ranks.ranks, ranks.ties) == ([1, math.inf], [2, 0])
    assert metrics(ranks.ranks, ["hit@3", "hit@50", "ndcg@50", "mrr"]) == {
        "hit@3": 0.5,
        "hit@50": 0.5,
        "ndcg@50": 0.5,
        "mrr": 0.5,
    }


def test_a_missed_target_is_missed_at_a_k_above_the_number_of_candidates(run: Callable[..., Any]) -> None:
    """RecBole's metrics, the intervals and the ranks of the record agree; 10 of 40 items are candidates."""
    values = {"topk": [1, 5, 20], "candidates": {"num_negatives": 9, "source": "retriever"}, "retriever_config": {"epochs": 1}}
    result, record = run("Pop", **values)
    missed = [rank for rank in record["ranks"]["Pop"].values() if rank is None]
    assert len(missed) == record["missed_targets"]["Pop"] > 10
    found = result["test_result"]["hit@20"]
    assert found == pytest.approx(1 - len(missed) / 60, abs=1e-4) and 0 < found < 1
    assert record["half_width_95"]["Pop"]["hit@20"] == pytest.approx(1.96 * math.sqrt(found * (1 - found) / 60), abs=1e-3)
    assert read_record(Path(result["record"])) == record


def test_ranks_of_tensors() -> None:
    scores = torch.tensor([[3.0, 1, 2], [1, 1, 1], [-math.inf, 0, -math.inf], [math.inf, 5, 5]])
    ranks, ties = target_ranks(scores, torch.tensor([2, 1, 2, 1]))
    assert (ranks.tolist(), ties.tolist()) == ([2, 2, 3, 2], [0, 2, 1, 1])
    ranks, ties = target_ranks(scores, torch.tensor([2, 1, 2, 1]), torch.tensor([True, False, True, False]))
    assert (ranks.tolist(), ties.tolist()) == ([math.inf, 2, math.inf, 2], [0, 2, 0, 1])


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=1, max_size=8))
def test_the_ranks_of_all_slots_are_a_permutation(row: list[float]) -> None:
    """Whatever is tied: so a target at a random slot gains nothing by ties."""
    slots = torch.arange(len(row))
    ranks, ties = target_ranks(torch.tensor([row] * len(row)), slots)
    assert sorted(ranks.tolist()) == list(range(1, len(row) + 1))
    assert ties.tolist() == [row.count(score) - 1 for score in row]


def test_a_constant_scorer_is_at_chance() -> None:
    """Every slot is equally likely for a target, so every rank is."""
    ranks = ranked([[1.5] * WIDTH] * WIDTH, list(range(WIDTH)))
    assert sorted(ranks.ranks) == [1, 2, 3, 4, 5]


def test_a_constant_scorer_is_at_chance_in_a_run(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hit@5 of 10 candidates over 60 users: 1/2, with a standard deviation of 0.065."""
    from recbole.model.general_recommender import BPR

    def constant(self: Any, interaction: Any) -> torch.Tensor:
        return torch.ones(len(interaction), self.n_items)

    monkeypatch.setattr(BPR, "full_sort_predict", constant)
    result, record = run("BPR", eval_users=60, seed=77)
    assert record["tie_rate"]["BPR"] == 1
    assert abs(result["test_result"]["hit@5"] - 0.5) < 0.2
    assert abs(result["best_valid_result"]["hit@5"] - 0.5) < 0.2


def test_a_model_that_gives_nan_ends_the_run(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole.model.general_recommender import BPR

    monkeypatch.setattr(BPR, "full_sort_predict", lambda self, inter: torch.full((len(inter), self.n_items), math.nan))
    for mode in ("candidates", "full"):
        with pytest.raises(ValueError, match="NaN"):
            run("BPR", seed=78, eval_args={"mode": mode})


@pytest.mark.parametrize("mode", ["candidates", "full"])
def test_infinite_scores_are_ranked_and_saved_as_the_largest_and_smallest_numbers(
    mode: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a file of predictions has every candidate, and can be evaluated again to the same ranks."""
    from recbole.model.general_recommender import BPR

    def scores(self: Any, interaction: Any) -> torch.Tensor:
        found = torch.arange(self.n_items).float().repeat(len(interaction), 1)
        found[:, ::3], found[:, 1::3] = -math.inf, math.inf
        return found

    monkeypatch.setattr(BPR, "full_sort_predict", scores)
    given = {**settings, "eval_args": {"mode": mode}}
    own = run_recbole_llm("BPR", "tiny", config_dict={**given, "save_predictions": True, "predictions_topk": 40})
    file = Path(own["record"]).with_name("predictions.parquet")
    found = pd.read_parquet(file)
    assert np.isfinite(found["score"]).all() and len(found) >= 600
    again = run_recbole_llm("Imported", "tiny", config_dict={**given, "predictions": str(file)})
    assert read_record(Path(again["record"]))["ranks"]["Imported"] == read_record(Path(own["record"]))["ranks"]["BPR"]


def by_hand(ranks: list[int], k: int) -> dict[str, float]:
    hits = [rank for rank in ranks if rank <= k]
    return {
        f"hit@{k}": len(hits) / len(ranks),
        f"mrr@{k}": sum(1 / rank for rank in hits) / len(ranks),
        f"ndcg@{k}": sum(1 / math.log2(1 + rank) for rank in hits) / len(ranks),
    }


@pytest.mark.parametrize(
    ("model", "mode"),
    [(model, mode) for model in ("Pop", "BPR", "SASRec") for mode in ("candidates", "full")],
)
def test_recboles_metrics_are_those_of_the_ranks(model: str, mode: str, run: Callable[..., Any]) -> None:
    result, record = run(model, eval_args={"mode": mode}, metric_decimal_place=12)
    ranks = list(record["ranks"][model].values())
    assert len(ranks) == 60
    for k in (1, 5):
        expected = by_hand(ranks, k)
        assert {key: result["test_result"][key] for key in expected} == pytest.approx(expected, abs=1e-9)


# -- scores of candidates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["BPR", "SASRec", "BERT4Rec"])
def test_scores_gathered_of_a_full_ranking_are_those_predicted_one_by_one(
    model: str, settings: dict[str, Any], assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble(model, settings)
    made.model.eval()
    interaction, _, _, targets = next(iter(made.test))
    interaction, candidates = interaction[:6], made.test.candidates.lookup(interaction["user_id"], targets)[:6]
    before = {key: tensor.clone() for key, tensor in interaction.interaction.items()}

    def refuse(_: Any) -> torch.Tensor:
        raise NotImplementedError

    with torch.no_grad():
        gathered = gather_scores(made.model, interaction, candidates, "item_id")
        monkeypatch.setattr(made.model, "full_sort_predict", refuse)  # as NeuMF's
        singly = gather_scores(made.model, interaction, candidates, "item_id")
        monkeypatch.setattr(ranks, "_PAIRS", 25)
        torch.testing.assert_close(gather_scores(made.model, interaction, candidates, "item_id"), singly, atol=1e-6, rtol=0)
    assert gathered.shape == candidates.shape == (6, 10) and gathered.std(1).min() > 0
    torch.testing.assert_close(singly, gathered, atol=1e-5, rtol=0)
    after = interaction.interaction
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_a_catalogue_is_scored_for_so_many_users_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        n_items, seen = 6, []  # noqa: RUF012

        def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
            self.seen.append(len(interaction))
            return (interaction["user_id"][:, None] * 10 + torch.arange(6)).flatten().float()

    users = Interaction({"user_id": torch.arange(5)})
    listed = torch.tensor([[5, 1]] * 5)
    monkeypatch.setattr(ranks, "SCORES", 13)
    assert gather_scores(Model(), users, listed, "item_id").tolist() == [[10 * user + 5, 10 * user + 1] for user in range(5)]
    assert Model.seen == [2, 2, 1]
    monkeypatch.setattr(ranks, "SCORES", 1)
    assert gather_scores(Model(), users, listed, "item_id").shape == (5, 2) and Model.seen[3:] == [1] * 5


def test_pop_scores_single_items_exactly_as_its_full_ranking(
    settings: dict[str, Any], assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("Pop", settings)
    made.model.item_cnt = torch.randint(1, 2**22, (made.model.n_items, 1))
    made.model.max_cnt = made.model.item_cnt.max(0)[0]
    interaction = next(iter(made.test))[0]
    listed = torch.randint(1, made.model.n_items, (len(interaction), 9))
    whole = made.model.full_sort_predict(interaction).view(len(interaction), -1).gather(1, listed).float()
    monkeypatch.setattr(made.model, "full_sort_predict", None)
    assert torch.equal(gather_scores(made.model, interaction, listed, "item_id"), whole)


def test_a_candidate_listed_twice_has_its_score_twice() -> None:
    class Places:
        n_items = 6

        def full_sort_predict(self, interaction: Any) -> torch.Tensor:
            return torch.arange(12.0)  # RecBole's models give two users of six items as one row

    scores = gather_scores(Places(), None, torch.tensor([[5, 0, 5], [1, 2, 3]]), "item_id")
    assert scores.tolist() == [[5, 0, 5], [7, 8, 9]]
