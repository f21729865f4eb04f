"""Methods: what each may look at, what it must never do worse than, and what it records."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.merging.coefficients import MergeProblem, entropy, fixed, uniform
from recbole_llm.merging.objectives import candidate_entropy
from recbole_llm.merging.points import simplex_lattice

MODULES = ["m0", "m1", "m2"]


def problem(names="ab", granularity="global", seed=0, objective=None, **more):
    """Users whose candidate scores are linear in the weights, each module adding its own part."""
    data = torch.randn(6, 5, len(MODULES), len(names), generator=torch.Generator().manual_seed(seed))  # [B, C, M, K]

    def linear(weights):
        return candidate_entropy(2 * (data * weights).sum((-1, -2)) / len(MODULES))

    return MergeProblem(list(names), MODULES, granularity, objective or linear, **more)


def trace_entropy(result, weights):
    return next(point["entropy"] for point in result.trace if point["weights"] == weights)


@pytest.mark.parametrize("count, size, finest", [(1, 1, 1), (2, 11, 10), (3, 10, 3), (4, 10, 2), (20, 20, 1)])
def test_lattice_is_bounded_and_holds_the_corners(count, size, finest):
    points = torch.stack(simplex_lattice(count, most=11))
    assert len(points) == size == len(points.unique(dim=0))
    torch.testing.assert_close(points.sum(1), torch.ones(size))
    assert all(any(torch.equal(point, corner) for point in points) for corner in torch.eye(count))
    torch.testing.assert_close(points * finest, (points * finest).round())


@pytest.mark.parametrize("granularity, shape", [("global", (4,)), ("module", (3, 4))])
def test_uniform(granularity, shape):
    result = uniform(problem("abcd", granularity))
    assert torch.equal(result.weights, torch.full(shape, 0.25))
    assert [point["phase"] for point in result.trace] == ["uniform"] + ["single"] * 4
    assert all("entropy" in point for point in result.trace)


def test_uniform_needs_no_prompts():
    result = uniform(MergeProblem(["a", "b"], MODULES))
    assert result.weights.tolist() == [0.5, 0.5] and "entropy" not in result.trace[0]


def test_fixed_by_list_and_by_name():
    for weights in ([0.2, 0.5], {"b": 0.5, "a": 0.2}):
        result = fixed(problem(settings={"weights": weights}))
        torch.testing.assert_close(result.weights, torch.tensor([0.2, 0.5]))
        assert [point["phase"] for point in result.trace] == ["uniform", "single", "single", "fixed"]


@pytest.mark.parametrize(
    "weights, message",
    [
        (None, "give one weight for each of"),
        ([0.5], "give one weight for each of"),
        ({"a": 1.0, "c": 0.0}, r"name \['a', 'c'\]"),
        ([1.7, -0.7], r"outside \[0, 1\]: \[1\.7, -0\.7\]; .*merge_extrapolate"),
        ([float("nan"), 1.0], "finite"),
    ],
)
def test_fixed_refuses(weights, message):
    with pytest.raises(ValueError, match=message):
        fixed(problem(settings={"weights": weights}))


def test_fixed_extrapolates_when_asked():
    assert fixed(problem(settings={"weights": [1.5, -0.5], "extrapolate": True})).weights.tolist() == [1.5, -0.5]


@pytest.mark.parametrize("granularity", ["global", "module"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 4))
def test_entropy_is_never_above_its_controls(granularity, seed, count):
    search = problem("abcd"[:count], granularity, seed)
    result = entropy(search)
    reached = search.objective(result.weights).item()
    assert result.weights.shape == search.shape
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(search.shape[:-1]))
    assert all(reached <= point["entropy"] for point in result.trace)
    assert sum(point["phase"] == "single" for point in result.trace) == count
    assert len(result.trace) <= 32 and (count != 2 or len(result.trace) == 31)


def test_entropy_finds_the_global_one_of_two_valleys():
    # a descent from the uniform point would end at .25; the deeper valley is at 1.0
    def valleys(weights):
        w = weights[0]
        return 2 - 0.5 * torch.exp(-((w - 0.25) ** 2) / 0.02) - torch.exp(-((w - 1.0) ** 2) / 0.005)

    assert entropy(problem(objective=valleys)).weights[0] > 0.97


def test_refinement_improves_on_the_lattice_and_modules_on_one_for_all():
    wanted = torch.tensor([0.1, 0.45, 0.72])  # of adapter a, module by module

    def bowl(weights):
        return (weights[..., 0] - wanted).square().mean()

    search, by_module = problem(objective=bowl), problem(objective=bowl, granularity="module")
    one, each = entropy(search), entropy(by_module)
    assert one.weights[0].item() == pytest.approx(wanted.mean().item(), abs=0.01)  # between two lattice points
    best = {phase: min(p["entropy"] for p in each.trace if p["phase"] == phase) for phase in ("grid", "adam")}
    assert best["adam"] < best["grid"] - 1e-3
    assert by_module.objective(each.weights) < search.objective(one.weights)


def test_permuting_adapters_permutes_weights():
    search = problem("abc", seed=5)
    order = torch.tensor([2, 0, 1])
    permuted = MergeProblem(["c", "a", "b"], MODULES, objective=lambda w: search.objective(w[order.argsort()]))
    torch.testing.assert_close(entropy(permuted).weights, entropy(search).weights[order], atol=1e-4, rtol=0)


def test_flat_objective_gives_the_uniform_point():
    assert entropy(problem(objective=lambda w: 1.0 + 0 * w.sum())).weights.tolist() == [0.5, 0.5]


def test_same_problem_twice_is_bit_equal():
    one, two = entropy(problem("abc", "module", 8)), entropy(problem("abc", "module", 8))
    assert torch.equal(one.weights, two.weights) and one.trace == two.trace


def test_entropy_reads_no_labels():
    def forbidden(weights):
        raise AssertionError("the entropy search looked at labels")

    entropy(problem(valid_score=forbidden))


def test_single_adapter_needs_no_search():
    assert entropy(problem("a")).weights.tolist() == [1.0]


def test_bad_problems_are_refused():
    with pytest.raises(ValueError, match="merge_granularity must be .* got 'layer'"):
        problem(granularity="layer")
    with pytest.raises(ValueError, match="different names"):
        problem("aa")
    with pytest.raises(ValueError, match="needs an objective"):
        entropy(MergeProblem(["a", "b"], MODULES))
    with pytest.raises(ValueError, match="entropy is nan at the weights"):
        entropy(problem(objective=lambda w: w.sum() * torch.nan))


def test_by_name_is_what_a_mixture_takes():
    weights = torch.arange(6.0).reshape(3, 2)
    assert problem(granularity="module").by_name(weights)["b"] == {"m0": 1.0, "m1": 3.0, "m2": 5.0}
    assert problem().by_name(torch.tensor([0.25, 0.75])) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_the_published_path_is_adam_from_equal_weights_to_its_end(granularity):
    given = {"start": "uniform", "steps": 7, "lr": 0.3}
    made = problem("ab", granularity, settings=given)
    result = entropy(made)
    assert [point["phase"] for point in result.trace] == ["uniform", "single", "single", *["adam"] * 7, "end"]
    assert result.trace[3]["weights"] == result.trace[0]["weights"] != result.trace[4]["weights"]
    raw = torch.zeros(made.shape, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.3)
    for _ in range(7):
        optimizer.zero_grad()
        made.objective(torch.softmax(raw, -1)).backward()
        optimizer.step()
    torch.testing.assert_close(result.weights, torch.softmax(raw, -1).detach())
    assert result.trace[-1]["weights"] == result.weights.tolist()


def test_a_better_corner_does_not_replace_the_published_path():
    made = problem("ab", objective=lambda w: (w[0] - 1) ** 2, settings={"start": "uniform", "steps": 2, "lr": 0.01})
    result = entropy(made)
    assert abs(result.weights[0].item() - 0.5) < 0.02
    assert min(point["entropy"] for point in result.trace) == trace_entropy(result, [1.0, 0.0]) == 0


def test_of_several_learning_rates_validation_chooses():
    target = torch.tensor([0.9, 0.1])
    given = {"start": "uniform", "steps": 5, "lr": [0.01, 0.2, 3.0]}
    made = problem("ab", objective=lambda w: (w[0] - 1) ** 2, settings=given, valid_score=lambda w: -float((w - target).norm()))
    ends = [point for point in entropy(made).trace if point["phase"] == "end"]
    assert [point["learning_rate"] for point in ends] == [0.01, 0.2, 3.0]
    assert entropy(made).weights.tolist() == max(ends, key=lambda point: point["score"])["weights"]
    with pytest.raises(ValueError, match="merge_learning_rate: .* need a labelled validation score"):
        entropy(problem("ab", settings=given))
