"""Rules on a made problem whose best weights are known."""

from dataclasses import replace

import pytest
import torch

from recbole_llm.merging.calibration import cross_entropies
from recbole_llm.merging.coefficients import MergeProblem, lattice_points
from recbole_llm.merging.lattice import Lattice
from recbole_llm.merging.rules import agreement, auto, calibrated_entropy, grid, likelihood
from recbole_llm.merging.stage import resolve


class Made:
    """Users whose targets are drawn from the softmax of scores that are linear in the weights.

    Args:
        parts: what each adapter adds to the scores at weight 1, ``[K, N, C]``.
        truth: the scores that draw the targets, ``[N, C]``.
    """

    def __init__(self, parts, truth, modules=3, seed=0):
        self.parts, self.modules = parts, modules
        draw = torch.Generator().manual_seed(seed)
        self.slots = torch.multinomial(torch.softmax(truth, -1), 1, generator=draw).squeeze(1)

    def _linear(self, weights):
        means = weights if weights.dim() == 1 else weights.mean(0)
        return torch.einsum("k,knc->nc", means, self.parts)

    def scores(self, weights):
        return self._linear(weights).detach()

    def values(self, scores):
        return (scores.argmax(1) == self.slots).double()

    def cross_entropy(self, users):
        return lambda weights: cross_entropies(self._linear(weights)[users], self.slots[users]).mean()


def made(users=600, candidates=8, signals=((1.0, 0.0), (0.0, 1.0)), truth=(1.0, 1.0), noise=0.0, seed=0):
    """Adapters that carry two independent signals to the given degrees; the truth is a sum of the signals."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, users, candidates, generator=draw)
    parts = torch.einsum("ks,snc->knc", torch.tensor(signals), basis)
    parts = parts + noise * torch.randn(parts.shape, generator=draw)
    return Made(parts, torch.einsum("s,snc->nc", torch.tensor(truth), basis), seed=seed)


def problem(labelled, granularity="global", **settings):
    names = ["a", "b", "c", "d"][: len(labelled.parts)]
    return MergeProblem(names, ["m0", "m1", "m2"], granularity, labelled=labelled, settings=settings)


def confident_and_wrong():
    """The first adapter knows nothing and is very sure; the second is right and unsure."""
    draw = torch.Generator().manual_seed(3)
    signal, junk = torch.randn(2, 800, 8, generator=draw)
    return Made(torch.stack([8 * junk, 0.7 * signal]), 2 * signal, seed=3)


def test_grid_maximizes_the_metric_and_prefers_even_weights():
    labelled = made(noise=0.5)
    search = problem(labelled)
    result = grid(search)
    best = max((float(labelled.values(labelled.scores(w)).mean()), -float(w.square().sum())) for _, w in lattice_points(search))
    assert (float(labelled.values(labelled.scores(result.weights)).mean()), -float(result.weights.square().sum())) == best
    assert len(result.trace) == 11 and max(point["score"] for point in result.trace) == pytest.approx(best[0])
    assert all(point.keys() == {"phase", "weights", "score"} for point in result.trace)
    same = made(users=100, signals=((1.0, 1.0), (1.0, 1.0)))
    assert grid(problem(same)).weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("granularity", ["global", "module"])
@pytest.mark.parametrize("rule", [grid, calibrated_entropy, agreement, likelihood, auto])
def test_known_scores_of_the_lattice_serve_in_place_of_measured_ones(rule, granularity, monkeypatch):
    labelled = made(users=60)
    search = problem(labelled, granularity, steps=2)
    live = rule(search)
    known = torch.stack([labelled.scores(weights) for _, weights in lattice_points(problem(labelled))])  # global points
    asked, scores = [], labelled.scores
    monkeypatch.setattr(labelled, "scores", lambda weights: asked.append(weights) or scores(weights))
    found = rule(replace(search, lattice_scores=known))
    for one, other in zip(found.trace, live.trace, strict=True):
        assert {**one, "weights": 0} == pytest.approx({**other, "weights": 0}) and one["weights"] == other["weights"]
    assert torch.equal(found.weights, live.weights) and found.weights.shape == search.shape
    assert len(asked) == (rule is auto)
    assert rule(replace(search, lattice_scores=known.flip(-1))).trace != live.trace  # they are read


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_calibration_undoes_the_choice_of_the_more_confident_adapter(granularity):
    labelled = confident_and_wrong()
    found = problem(labelled, granularity)
    lattice = Lattice.measured(labelled, lattice_points(found))
    plain = lattice.weights[lattice.entropy().mean(1).argmin()].reshape(-1, 2).mean(0)
    assert plain[0] == 1.0  # least entropy takes the one that knows nothing
    result = calibrated_entropy(found)
    assert result.weights.shape == found.shape and result.weights.reshape(-1, 2).mean(0)[1] == 1.0
    temperatures = result.settings["temperatures"]
    assert temperatures["a"] > 10 and temperatures["b"] == pytest.approx(0.35, rel=0.2)
    assert {"score", "calibrated_entropy"} <= set(result.trace[0])


def test_the_temperature_of_a_mixture_is_the_weighted_geometric_mean():
    labelled = confident_and_wrong()
    lattice = Lattice.measured(labelled, lattice_points(problem(labelled)))
    first, second = lattice.temperatures()
    place = next(i for i, weights in enumerate(lattice.weights) if torch.allclose(weights, torch.tensor([0.3, 0.7])))
    p = torch.softmax(lattice.scores[place].double() / (first**0.3 * second**0.7), -1)
    expected = -(p * p.log()).sum(-1)
    torch.testing.assert_close(lattice.calibrated_entropy()[place].double(), expected, atol=1e-4, rtol=1e-4)


def test_agreement_finds_the_point_between_adapters_and_reads_no_labels():
    found = made(signals=((1.0, 0.0), (0.0, 1.0)))
    weights = agreement(problem(found)).weights
    assert 0.3 < weights[0] < 0.7
    found.slots = (found.slots + 1) % 8
    assert torch.equal(agreement(problem(found)).weights, weights)


def test_agreement_is_the_least_mean_divergence():
    draw = torch.Generator().manual_seed(0)
    parts = torch.tensor([3.0, 1.0, 0.5])[:, None, None] * torch.randn(3, 100, 6, generator=draw)
    search = problem(Made(parts, parts[0]), points=15)
    p = torch.softmax(parts.double(), -1)

    def divergence(weights):
        q = torch.softmax(torch.einsum("k,knc->nc", weights, parts).double(), -1)
        return sum((own * (own / q).log()).sum(-1).mean() for own in p)

    expected = min((weights for _, weights in lattice_points(search)), key=divergence)
    assert torch.equal(agreement(search).weights, expected) and expected.max() != expected.min()


@pytest.mark.parametrize("name", ["grid", "calibrated_entropy", "agreement", "likelihood", "auto"])
def test_rules_need_labelled_users_and_have_names(name):
    with pytest.raises(ValueError, match=f"merge: {name} needs labelled validation users"):
        resolve(name)(MergeProblem(["a", "b"], []))


def test_one_adapter_has_all_weight():
    labelled = made(signals=((1.0, 1.0),))
    assert calibrated_entropy(problem(labelled)).weights.tolist() == [1.0]
    assert agreement(problem(labelled)).weights.tolist() == grid(problem(labelled)).weights.tolist() == [1.0]


# -- likelihood --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_likelihood_recovers_the_weights_that_drew_the_targets(granularity):
    labelled = made(users=2500, truth=(0.75, 0.25))
    search = problem(labelled, granularity, steps=60, lr=0.1, points=5)
    result = likelihood(search)
    assert result.weights.shape == search.shape
    torch.testing.assert_close(result.weights.reshape(-1, 2).mean(0), torch.tensor([0.75, 0.25]), atol=0.08, rtol=0)
    assert labelled.cross_entropy(range(2500))(result.weights) <= min(point["loss"] for point in result.trace) + 1e-6


def test_the_likeliest_weights_are_between_the_points_of_the_lattice():
    search = problem(made(users=2500, truth=(0.6, 0.4)), points=3, steps=30, lr=0.05)
    best = {phase: min(p["loss"] for p in likelihood(search).trace if p["phase"] == phase) for phase in ("uniform", "adam")}
    assert best["adam"] < best["uniform"] - 1e-4


def test_shrinkage_draws_to_the_uniform_mixture():
    labelled = made(users=400, truth=(1.0, 0.0))
    found = [likelihood(problem(labelled, shrinkage=s, steps=40)).weights[0].item() for s in (0.0, 0.3, 100.0)]
    assert found[0] > 0.9 > found[1] > found[2] == pytest.approx(0.5, abs=0.01)
    plain, shrunk = (likelihood(problem(labelled, shrinkage=s, steps=0)).trace for s in (0.0, 0.3))
    assert shrunk[0]["loss"] == pytest.approx(plain[0]["loss"])  # uniform
    assert shrunk[1]["loss"] == pytest.approx(plain[1]["loss"] + 0.3, abs=1e-5)  # a single adapter


# -- auto --------------------------------------------------------------------------------------------------------------


def harmful(seed):
    """The first adapter is right, the second adds noise alone."""
    draw = torch.Generator().manual_seed(seed)
    signal, noise = torch.randn(2, 300, 8, generator=draw)
    return Made(torch.stack([2 * signal, 2 * noise]), 2 * signal, seed=seed)


def test_a_harmful_adapter_gets_weight_zero():
    for seed in range(5):
        result = auto(problem(harmful(seed), steps=3))
        assert result.weights[0] > 0.85  # a little of the noise may be within the error
    assert sum(auto(problem(harmful(seed), steps=3)).weights.tolist() == [1.0, 0.0] for seed in range(5)) >= 4


def test_a_mixture_that_helps_is_taken_and_one_that_does_not_is_refused():
    helps = auto(problem(made(users=1500, truth=(2.0, 2.0)), steps=3))
    verdict = helps.trace[-1]
    assert verdict["phase"] == "confirm" and verdict["taken"] and 0.3 < helps.weights[0] < 0.7
    assert verdict["difference"] > verdict["standard_error"] > 0 and helps.weights.tolist() == verdict["weights"]
    same = made(users=500, signals=((1.0, 1.0), (1.0, 1.0)))
    refused = auto(problem(same, steps=3))
    assert not refused.trace[-1]["taken"] and sorted(refused.weights.tolist()) == [0.0, 1.0]


def test_what_is_chosen_on_one_half_is_confirmed_by_the_other_alone():
    labelled = made(users=1500, truth=(2.0, 2.0))
    before = auto(problem(labelled, steps=3)).trace[-1]
    wrong = (labelled.slots + 1) % 8
    labelled.slots[1::2] = wrong[1::2]  # the half that confirms
    after = auto(problem(labelled, steps=3)).trace[-1]
    assert after["weights"] == before["weights"]  # the choice is the other half's
    assert before["taken"] and not after["taken"]


def test_the_safeguard_compares_with_the_single_adapter_that_is_better_on_all():
    labelled = confident_and_wrong()
    result = auto(problem(labelled, steps=3))
    assert result.trace[-1]["better_single"] == "b"
    values = labelled.values(labelled.scores(result.weights)).mean()
    single = labelled.values(labelled.scores(torch.tensor([0.0, 1.0]))).mean()
    assert values >= single - 0.02


def test_auto_needs_users_for_two_halves():
    with pytest.raises(ValueError, match=r"halves, but there are 3; give 4 or more \(valid_users"):
        auto(problem(made(users=3)))


def test_rules_by_module_and_of_three_adapters_have_the_right_shapes():
    three = made(users=60, signals=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)))
    for rule in (grid, calibrated_entropy, agreement, likelihood, auto):
        for granularity, shape in (("global", (3,)), ("module", (3, 3))):
            weights = rule(problem(three, granularity, steps=2, points=10)).weights
            assert weights.shape == shape and torch.allclose(weights.sum(-1), torch.ones(shape[:-1]))
