"""Rules of a cascade: chosen by the gains of validation users, with safeguards against the best of many."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_llm.model.cascade.routing import Choice, RoutingSettings, Rule, choose, features, fused, rules

NAMES = ["entropy", "history_length"]
SETTINGS = RoutingSettings(features=NAMES, steps=10, standard_errors=1.0, fusion="llm", weights=[1.0])


def known(users: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"entropy": rng.random(users), "history_length": rng.integers(3, 9, users).astype(float)}


def test_features_are_those_of_history_candidates_and_scores() -> None:
    counts = torch.tensor([0, 0, 1, 3, 7])
    found = features([[3, 4], [2]], torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), counts)
    assert found["history_length"].tolist() == [2, 1]
    assert found["history_popularity"] == pytest.approx([(math.log(4) + math.log(8)) / 2, math.log(2)])
    assert found["candidate_popularity"] == pytest.approx([math.log(2) / 2, (math.log(4) + math.log(8)) / 2])
    assert found["unseen_candidates"].tolist() == [0.5, 0]
    assert found["entropy"] == pytest.approx([math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)])
    assert found["margin"] == pytest.approx([0, 0.5])


def test_rules_cut_between_different_values_at_equal_steps() -> None:
    users = {"entropy": np.arange(20.0), "history_length": np.array([3.0] * 15 + [5.0] * 5)}
    found = [*rules(users, NAMES, 4)]
    assert {(rule.high, rule.share, rule.threshold) for rule in found if rule.feature == "entropy"} == {
        *((True, 0.25, 14.5), (True, 0.5, 9.5), (True, 0.75, 4.5)),
        *((False, 0.25, 4.5), (False, 0.5, 9.5), (False, 0.75, 14.5)),
    }
    lengths = [rule for rule in found if rule.feature == "history_length"]
    assert [(rule.high, rule.share, rule.threshold) for rule in lengths] == [(False, 0.75, 4), (True, 0.25, 4)]
    assert all(rule(users).mean() == rule.share for rule in found)
    assert not [*rules({"entropy": np.ones(9)}, ["entropy"], 4)]


def test_users_who_gain_are_found() -> None:
    users, rng = known(600), np.random.default_rng(1)
    gains = np.where(users["entropy"] > 0.7, 0.4, -0.2) + rng.normal(0, 0.1, 600)
    choice = choose(gains[None], users, SETTINGS)
    assert (choice.rule.feature, choice.rule.high) == ("entropy", True) and abs(choice.rule.threshold - 0.7) < 0.05
    routed = choice.rule(users)
    assert routed.mean() == choice.rule.share and choice.gain == pytest.approx((gains * routed).mean())
    assert 0.08 < choice.cross_fitted_gain <= choice.gain + 0.01 and choice.everybody == pytest.approx(gains.mean())


@pytest.mark.parametrize("sign, share", [(1, 1.0), (-1, 0.0)])
def test_everybody_and_nobody_are_results(sign: int, share: float) -> None:
    users = known(300)
    gains = sign * np.random.default_rng(2).uniform(0.1, 0.3, 300)
    choice = choose(gains[None], users, SETTINGS)
    assert choice.rule.share == share and choice.rule(users).all() == bool(share) and choice.rule(users).any() == bool(share)
    assert ("everybody" if share else "nobody") in str(choice.rule)


def test_noise_routes_nobody_mostly_and_the_best_of_many_rules_would_not() -> None:
    """Gains without any relation to the features, with mean 0."""
    chosen, careless = 0, 0
    for seed in range(40):
        users, gains = known(150, seed), np.random.default_rng(1000 + seed).normal(0, 1, 150)
        chosen += choose(gains[None], users, SETTINGS).rule.share > 0
        careless += max(rule(users) @ gains for rule in rules(users, NAMES, 10)) > 0
    assert careless > 36 and chosen <= 10


def test_fewer_users_are_routed_where_more_gain_about_the_same() -> None:
    users = known(400)
    gains = np.where(users["entropy"] > 0.8, 0.5, 0.0) + np.random.default_rng(3).normal(0, 0.02, 400)
    careful, greedy = (choose(gains[None], users, replace(SETTINGS, standard_errors=errors)) for errors in (1.0, 0.0))
    assert careful.rule.share <= greedy.rule.share and careful.rule.share == pytest.approx(
        (users["entropy"] > 0.8).mean(), abs=0.06
    )


def test_the_weight_of_a_fusion_is_chosen_with_the_rule() -> None:
    users = known(200)
    gains = np.stack([np.full(200, 0.1), np.full(200, 0.3), np.full(200, -0.2)])
    choice = choose(gains, users, replace(SETTINGS, fusion="z_score", weights=[0.25, 0.5, 0.75]))
    assert choice.rule.weight == 0.5 and choice.rule.share == 1


def test_where_nobody_is_routed_the_weight_is_that_which_is_best_for_everybody() -> None:
    """A heavy weight helps the best of many groups by chance, and harms all users together."""
    for seed in (4, 6, 9):
        users, noise = known(200, seed), np.random.default_rng(seed).normal(0, 1, 200)
        gains = np.stack([0.02 * noise - 0.005, noise - 0.1])
        choice = choose(gains, users, replace(SETTINGS, fusion="z_score", weights=[0.25, 0.75]))
        assert (choice.rule.share, choice.rule.weight) == (0, 0.25)
        assert choice.everybody == pytest.approx(gains[0].mean())


def test_features_without_a_difference_leave_nobody_and_everybody() -> None:
    users = {"entropy": np.ones(50), "history_length": np.full(50, 4.0)}
    assert [choose(np.full((1, 50), gain), users, SETTINGS).rule.share for gain in (-0.1, 0.1)] == [0, 1]


def test_a_choice_is_read_as_it_was_written() -> None:
    choice = choose(np.random.default_rng(0).normal(0.1, 1, (1, 80)), known(80), SETTINGS)
    assert Choice.read(json.loads(json.dumps(choice.as_dict()))) == choice


def test_a_rule_decides_for_each_user_alone() -> None:
    users, rule = known(30), Rule("history_length", False, 5.5, 0.5)
    together = rule(users)
    alone = [rule({name: values[i : i + 1] for name, values in users.items()})[0] for i in range(30)]
    assert together.tolist() == alone == (users["history_length"] < 5.5).tolist()
    assert (np.diff(rule.priority(users)[np.argsort(-users["history_length"])]) >= 0).all()


def test_fused_scores() -> None:
    cheap, llm = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[-9.0, -1.0, -5.0]])
    assert fused("llm", cheap, llm, 1.0) is llm
    ranks = fused("reciprocal_rank", cheap, llm, 0.25)
    torch.testing.assert_close(ranks, torch.tensor([[0.25 / 3 + 0.75, 0.25 + 0.75 / 3, 0.25 / 2 + 0.75 / 2]]))
    scaled = fused("z_score", cheap, llm, 0.5)
    torch.testing.assert_close(scaled, torch.zeros(1, 3), atol=1e-6, rtol=0)  # opposite orders at equal distances
    torch.testing.assert_close(fused("z_score", 2 * cheap + 1, llm, 0.3), fused("z_score", cheap, llm, 0.3))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="routing_features: an empty list leaves no rule"):
        replace(SETTINGS, features=[])
