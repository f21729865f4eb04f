"""Methods of the field: each against its dense definition, and what must hold whatever the adapters are."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from recbole_llm.llm.adapter_folders import Adapter
from recbole_llm.merging import methods
from recbole_llm.merging.arithmetic import all_modules, weighted_sum
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.methods import shared_basis
from recbole_llm.merging.stage import resolve

# the adapters of the exact sum's tests; test folders are no packages
_spec = importlib.util.spec_from_file_location("test_arithmetic", Path(__file__).with_name("test_arithmetic.py"))
_arithmetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_arithmetic)
SHAPES, UNEQUAL, dense, make_adapter = (getattr(_arithmetic, n) for n in ("SHAPES", "UNEQUAL", "dense", "make_adapter"))

ENTRYWISE = {
    "ties": merge_utils.ties,
    "dare": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
NEW = [*ENTRYWISE, "orthogonal_residual", "factors"]
LINEAR = ["dare", "magnitude_prune"]
Q, UP = "model.layers.0.q_proj", "model.layers.0.up_proj"


def problem(adapters, **settings):
    names = [adapter.name for adapter in adapters]
    return MergeProblem(names, all_modules(adapters), settings=settings, adapters=list(adapters))


def merge(method, adapters, **settings):
    """What the stage would write."""
    asked = problem(adapters, **settings)
    result = resolve(method)(asked)
    if result.merged is not None:
        return result.merged
    table = dict(zip(asked.modules, result.weights, strict=True)) if result.weights.dim() == 2 else result.weights
    return weighted_sum(adapters, table)


def assert_deltas(merged, expected, tolerance=1e-5):
    got = dense(merged)
    assert set(got) == set(expected)
    for module, delta in expected.items():
        assert (got[module] - delta).norm() <= tolerance * max(delta.norm(), 1e-6)


def renamed(adapter, name):
    return Adapter(adapter.config, adapter.tensors, name)


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("adapter", UNEQUAL, ids=lambda adapter: adapter.name)
def test_one_adapter_alone_is_given_back(method, adapter):
    assert_deltas(merge(method, [adapter], density=1), dense(adapter))


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("adapter", UNEQUAL, ids=lambda adapter: adapter.name)
def test_two_equal_adapters_are_the_adapter(method, adapter):
    assert_deltas(merge(method, [adapter, renamed(adapter, "twin")], density=1), dense(adapter))


@pytest.mark.parametrize("method", list(ENTRYWISE))
def test_weight_one_and_zero_give_the_adapter_back(method):
    merged = merge(method, UNEQUAL[:2], density=1, weights=[1, 0])
    assert_deltas(merged, dense(UNEQUAL[0]))
    assert merged.config["r"] == UNEQUAL[0].config["r"]  # the other one takes no rank


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("weights", [(1, 0, -0.5, 1), (0.3, 0.7, 0.2, 0.1), (-0.5, -0.5, 1, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_linear_methods_at_density_one_are_the_weighted_sum(method, weights, count):
    adapters, weights = UNEQUAL[:count], list(weights[:count])
    merged = merge(method, adapters, density=1, weights=weights, extrapolate=True)
    expected = dense(weighted_sum(adapters, torch.tensor(weights, dtype=torch.float32)))
    assert_deltas(merged, expected)
    assert all(scaling == 1 for scaling in map(merged.scaling, merged.modules))


# -- the shared basis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shared_basis_is_the_svd_of_the_deltas_side_by_side(count):
    adapters = UNEQUAL[:count]
    u, s, coordinates = shared_basis([tuple(f.double() for f in adapter.factors(Q)) for adapter in adapters])
    beside = torch.cat([dense(adapter)[Q] for adapter in adapters], dim=1)  # [D_out, K D_in]
    expected = torch.linalg.svdvals(beside)
    torch.testing.assert_close(s, expected[: len(s)], atol=1e-5, rtol=1e-5)
    assert (expected[len(s) :] <= 1e-9 * expected[0]).all()  # only null directions are left out
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=u.dtype))
    rotated = torch.cat(list(coordinates), dim=1)  # [R, K D_in]
    torch.testing.assert_close(u @ rotated, beside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=1), s)  # rows are S V^T


def test_shared_basis_leaves_null_directions_out():
    a, b = (factor.double() for factor in UNEQUAL[0].factors(Q))
    u, s, coordinates = shared_basis([(a, b), (2 * a, b)])
    assert (u.shape, s.shape, coordinates.shape) == ((12, 3), (3,), (2, 3, 8))
    zero = shared_basis([(a, 0 * b)])
    assert zero[1].tolist() == [0.0]  # one direction stays, so that there is an adapter


@pytest.mark.parametrize("method", list(ENTRYWISE))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_entrywise_methods_equal_peft_in_the_dense_basis(method, count):
    adapters = UNEQUAL[:count]
    weights = [0.5, 1.0, 0.25, 0.75][:count]
    got = dense(merge(method, adapters, density=0.4, weights=weights, seed=7))
    torch.manual_seed(7)
    for module in all_modules(adapters):
        have = [(w, adapter) for w, adapter in zip(weights, adapters, strict=True) if adapter.has(module)]
        # the definition, from full matrices; the basis itself is ours, since signs and order of U are free
        u, _, _ = shared_basis([tuple(f.double() for f in adapter.factors(module)) for _, adapter in have])
        entries = [u.T @ dense(adapter)[module] for _, adapter in have]
        expected = u @ ENTRYWISE[method](entries, torch.tensor([w for w, _ in have]).double(), 0.4)
        torch.testing.assert_close(got[module], expected, atol=2e-5, rtol=1e-4)


def test_ties_keeps_only_the_elected_sign():
    adapters = UNEQUAL[:3]
    merged = dense(merge("ties", adapters, density=0.6))[Q]
    u, _, _ = shared_basis([tuple(f.double() for f in adapter.factors(Q)) for adapter in adapters])
    entries = torch.stack([u.T @ dense(adapter)[Q] for adapter in adapters])  # [K, R, D_in]
    got = u.T @ merged
    for row in range(got.shape[0]):
        for column in range(got.shape[1]):
            kept = []
            for delta in entries:
                large = sorted(delta.abs().flatten().tolist(), reverse=True)[: int(0.6 * delta.numel())]
                value = delta[row, column].item()
                kept.append(value if abs(value) >= large[-1] - 1e-12 else 0.0)
            agreeing = [value for value in kept if value and (value > 0) == (sum(kept) >= 0)]
            expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert got[row, column].item() == pytest.approx(expected, abs=2e-5)


def test_dare_is_unbiased():
    small = [make_adapter("a", 1, r=1, modules=(Q,)), make_adapter("b", 2, r=2, alpha=3, modules=(Q,))]
    draws = 1000
    sums = [merge("dare", small, density=0.3, seed=seed) for seed in range(draws)]
    key = f"base_model.model.{Q}.lora_"
    a = torch.stack([adapter.tensors[f"{key}A.weight"] for adapter in sums]).double()  # [N, R, D_in]
    b = sums[0].tensors[f"{key}B.weight"].double()  # [D_out, R], the same basis in every draw
    expected = sum(dense(adapter)[Q] for adapter in small) / 2
    error = (b @ a.mean(0) - expected).abs()
    standard = (b.square() @ a.var(0)).sqrt() / math.sqrt(draws)  # entries are drawn independently
    assert (a.std(0) > 0).all()
    # of 96 entries hardly one is beyond three standard errors, and 3 x 8 independent draws lie behind their mean square
    assert (error > 3 * standard).double().mean() <= 0.03
    assert (error / standard).square().mean() <= 1 + 3 * math.sqrt(2 / 24)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
def test_magnitude_prune_keeps_the_share_and_the_largest(density):
    adapter = UNEQUAL[0]
    merged = merge("magnitude_prune", [adapter], density=density)
    for module, delta in dense(adapter).items():
        u, _, (entries,) = shared_basis([tuple(f.double() for f in adapter.factors(module))])
        left = u.T @ dense(merged)[module]
        kept = left.abs() > 1e-5 * delta.norm()
        assert kept.sum() == int(density * entries.numel())
        assert entries[kept].abs().min() >= entries[~kept].abs().max()


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_draws_depend_on_the_seed_alone(method):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (merge(method, UNEQUAL[:2], seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    three, other = merge(method, UNEQUAL[:2], seed=3), merge(method, UNEQUAL[:2], seed=4)
    for key, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[key]) and torch.equal(tensor, three.tensors[key])
    assert any(not torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())


@pytest.mark.parametrize("method", NEW)
def test_zero_adapters_merge_to_zero(method):
    zero = Adapter(UNEQUAL[0].config, {k: t * (".lora_A." in k) for k, t in UNEQUAL[0].tensors.items()}, "zero")
    merged = merge(method, [zero, renamed(zero, "twin")])
    assert all((delta == 0).all() for delta in dense(merged).values())


# -- projections and factors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", [0.0, 0.1, 1.0])
def test_orthogonal_residual_equals_the_dense_projection(count, residual):
    adapters = UNEQUAL[:count]
    first, *others = (dense(adapter) for adapter in adapters)
    expected = {}
    for module, delta in first.items():
        expected[module] = delta.clone()
        for other in others:
            if module in other:
                rest = other[module] - (other[module] * delta).sum() / (delta * delta).sum() * delta
                assert abs((rest * delta).sum()) <= 1e-9 * delta.square().sum()
                expected[module] += residual * rest
    merged = merge("orthogonal_residual", adapters, residual=residual)
    assert_deltas(merged, expected)
    for module, delta in dense(merged).items():  # along the first adapter nothing has changed
        assert (delta * first[module]).sum() == pytest.approx(first[module].square().sum().item(), rel=1e-5)


def test_orthogonal_residual_where_the_first_adapter_has_nothing():
    only, both = UNEQUAL[2], UNEQUAL[0]
    result = resolve("orthogonal_residual")(asked := problem([only, both], residual=0.2))
    rows = dict(zip(asked.modules, result.weights.tolist(), strict=True))
    assert result.derived and rows[UP] == pytest.approx([0.0, 0.2]) and rows[Q][1] == pytest.approx(0.2)
    expected, first = {module: 0.2 * delta for module, delta in dense(both).items()}, dense(only)[Q]
    expected[Q] += first - (expected[Q] * first).sum() / first.square().sum() * first
    assert_deltas(merge("orthogonal_residual", [only, both], residual=0.2), expected)


def test_orthogonal_residual_measures_its_own_point():
    adapters = UNEQUAL[:2]
    asked = MergeProblem(["a", "b"], list(SHAPES), objective=lambda w: w.square().sum(), adapters=adapters)
    result = methods.orthogonal_residual(asked)
    assert [point["phase"] for point in result.trace] == ["uniform", "single", "single", "orthogonal_residual"]
    assert result.weights.shape == (3, 2) and result.trace[-1]["entropy"] == pytest.approx(result.weights.square().sum().item())


@pytest.mark.parametrize("weights", [None, [1, 0], [0.3, 0.7], [1, -0.5]])
def test_factors_equals_the_equations_with_cross_terms(weights):
    adapters = [make_adapter("a", 1, r=3, alpha=6), make_adapter("b", 2, r=3, alpha=4, rslora=True)]
    merged = merge("factors", adapters, weights=weights, extrapolate=True)
    expected = {}
    for module in SHAPES:
        pairs = [tuple(f.double() for f in adapter.factors(module)) for adapter in adapters]
        w = weights or [0.5, 0.5]
        expected[module] = sum(w[i] * w[j] * pairs[i][1] @ pairs[j][0] for i in range(2) for j in range(2))
    assert_deltas(merged, expected)
    assert merged.config["r"] == merged.config["lora_alpha"] == 3


def test_factors_refuses_unlike_adapters():
    with pytest.raises(ValueError, match=r"in model.layers.0.q_proj the adapters 'a' and 'b' have 3 and 5"):
        merge("factors", UNEQUAL[:2])
    part = make_adapter("part", 1, modules=(Q,))
    with pytest.raises(ValueError, match=r"in model.layers.0.up_proj the adapters 'a' and 'part' have 3 and no factors"):
        merge("factors", [UNEQUAL[0], part])


# -- memory and what is refused ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("method", ["uniform", *NEW])
def test_no_full_weight_matrix_is_ever_created(method):
    wide = [make_wide(name, seed) for seed, name in enumerate("ab")]
    with Largest() as largest:
        merge(method, wide)
    assert 1024 <= largest.elements <= 16 * 512  # K sum(r) D, against 512 * 512


def make_wide(name, seed):
    generator, key = torch.Generator().manual_seed(seed), "base_model.model.wide.lora_"
    factors = {"A": torch.randn(2, 512, generator=generator), "B": torch.randn(512, 2, generator=generator)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["wide"]}
    return Adapter(config, {f"{key}{factor}.weight": t for factor, t in factors.items()}, name)


@pytest.mark.parametrize("method", NEW)
def test_methods_say_that_they_need_the_adapters(method):
    with pytest.raises(ValueError, match=r"the problem names \['a', 'b'\], but its adapters are \[\]"):
        resolve(method)(MergeProblem(["a", "b"], list(SHAPES)))


@pytest.mark.parametrize("method", NEW)
def test_methods_refuse_another_base(method):
    with pytest.raises(ValueError, match="different base models"):
        merge(method, [UNEQUAL[0], make_adapter("z", 1, base_model_name_or_path="big")])


@pytest.mark.parametrize("density", [0, -0.1, 1.5, "half", math.nan])
@pytest.mark.parametrize("method", list(ENTRYWISE))
def test_density_outside_its_range_is_refused(method, density):
    with pytest.raises(ValueError, match=rf"merge_density must be in \(0, 1\], got {density!r}"):
        merge(method, UNEQUAL[:2], density=density)


@pytest.mark.parametrize("residual", [-0.1, 1.5, "a bit", math.nan])
def test_residual_outside_its_range_is_refused(residual):
    with pytest.raises(ValueError, match=rf"merge_residual must be in \[0, 1\], got {residual!r}"):
        merge("orthogonal_residual", UNEQUAL[:2], residual=residual)


@pytest.mark.parametrize("method", [*ENTRYWISE, "factors"])
def test_weights_of_the_methods_are_checked(method):
    equal = [make_adapter("a", 1), make_adapter("b", 2)]
    with pytest.raises(ValueError, match="give one weight for each of"):
        merge(method, equal, weights=[0.5])
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*merge_extrapolate"):
        merge(method, equal, weights={"a": 1.5, "b": 0.5})
