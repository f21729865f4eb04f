"""Exact sums: the stacked factors against the dense deltas, the identity, compression, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.merging.arithmetic import compress, weighted_sum, write_adapter

SHAPES = {"model.layers.0.q_proj": (12, 8), "model.layers.0.up_proj": (20, 8), "model.layers.1.q_proj": (12, 8)}


def make_adapter(name, seed, r=3, alpha=6, rslora=False, modules=tuple(SHAPES), **config):
    generator = torch.Generator().manual_seed(seed)
    tensors, pattern = {}, config.get("rank_pattern", {})
    for module in modules:
        d_out, d_in = SHAPES[module]
        rank = pattern.get(module, r)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora, "bias": "none"} | config
    return Adapter({"target_modules": ["q_proj", "up_proj"], "base_model_name_or_path": "tiny"} | config, tensors, name)


def dense(adapter):
    """Module -> dW in float64, from the definition."""
    deltas = {}
    for module in adapter.modules:
        a, b = (adapter.tensors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
        alpha = adapter.config.get("alpha_pattern", {}).get(module, adapter.config["lora_alpha"])
        deltas[module] = b @ a * alpha / (math.sqrt(len(a)) if adapter.config["use_rslora"] else len(a))
    return deltas


def assert_sum(merged, adapters, weights):
    deltas, got = [dense(adapter) for adapter in adapters], dense(merged)
    for module in got:
        row = weights[module] if isinstance(weights, dict) else weights
        terms = [w.double() * delta[module] for w, delta in zip(row, deltas, strict=True) if module in delta]
        expected = sum(terms)
        scale = max(sum(term.norm() for term in terms), 1e-30)
        assert (got[module] - expected).norm() / scale <= 1e-6


UNEQUAL = [
    make_adapter("a", 1, r=3, alpha=6),
    make_adapter("b", 2, r=5, alpha=4, rslora=True),
    make_adapter("c", 3, r=2, alpha=32, modules=("model.layers.0.q_proj",)),
    make_adapter("d", 4, rank_pattern={"model.layers.1.q_proj": 1}, alpha_pattern={"model.layers.0.up_proj": 9}),
]


@pytest.mark.parametrize("weights", [(1, 0, -0.5, 1), (0.3, 0.7, 0.2, 0.1), (-0.5, -0.5, 1, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sum_equals_dense_deltas(count, weights):
    adapters, weights = UNEQUAL[:count], torch.tensor(weights[:count], dtype=torch.float32)
    merged = weighted_sum(adapters, weights)
    assert_sum(merged, adapters, weights)
    assert set(merged.modules) == set(SHAPES)


def test_sum_with_weights_per_module():
    weights = {module: torch.rand(4, generator=torch.Generator().manual_seed(i)) for i, module in enumerate(SHAPES)}
    assert_sum(weighted_sum(UNEQUAL, weights), UNEQUAL, weights)


def test_config_says_scaling_one_and_rank_sum():
    merged = weighted_sum(UNEQUAL[:2], torch.tensor([0.4, 0.6]))
    assert (merged.config["r"], merged.config["lora_alpha"], merged.config["use_rslora"]) == (8, 8, False)
    assert merged.config["rank_pattern"] == {} and merged.config["target_modules"] == ["q_proj", "up_proj"]
    uneven = weighted_sum(UNEQUAL[:3], torch.ones(3))
    assert uneven.config["r"] == 10 and uneven.config["target_modules"] == sorted(SHAPES)
    assert uneven.config["rank_pattern"] == dict.fromkeys(list(SHAPES)[1:], 8) == uneven.config["alpha_pattern"]
    assert all(uneven.scaling(module) == 1 for module in uneven.modules)


@pytest.mark.parametrize("adapter", UNEQUAL[:2], ids=lambda adapter: adapter.name)
def test_identity_gives_the_adapter_back(adapter):
    other = make_adapter("other", 9, r=4)
    merged = weighted_sum([adapter, other], torch.tensor([1.0, 0.0]))
    assert merged.config["r"] == adapter.config["r"]  # the other one takes no rank
    assert_sum(merged, [adapter], torch.tensor([1.0]))


def test_half_and_half_of_identical_adapters_is_a_no_op():
    adapter = UNEQUAL[0]
    assert_sum(weighted_sum([adapter, adapter], torch.tensor([0.5, 0.5])), [adapter], torch.tensor([1.0]))


def test_all_zero_weights_are_a_valid_zero():
    merged = weighted_sum(UNEQUAL, torch.zeros(4))
    assert set(merged.modules) == set(SHAPES)
    assert all((delta == 0).all() for delta in dense(merged).values())


def test_half_precision_sources_are_summed_in_fp32():
    source = UNEQUAL[0]
    half = Adapter(source.config, {key: t.bfloat16() for key, t in source.tensors.items()}, "half")
    merged = weighted_sum([half], torch.tensor([0.3]))
    assert {t.dtype for t in merged.tensors.values()} == {torch.float32}
    assert_sum(merged, [half], torch.tensor([0.3]))


def test_compress_is_the_best_of_its_rank():
    merged = weighted_sum(UNEQUAL, torch.tensor([0.5, 0.3, 0.1, 0.1]))
    small, energy = compress(merged, 2)
    kept = total = 0.0
    for module, delta in dense(merged).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        torch.testing.assert_close(dense(small)[module], u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-5)
        kept, total = kept + s[:2].square().sum(), total + s.square().sum()
    assert energy == pytest.approx(float(kept / total), abs=1e-6)
    assert small.config["r"] == small.config["lora_alpha"] == 2


def test_compress_to_full_rank_keeps_everything():
    adapter = UNEQUAL[1]
    full, energy = compress(adapter, 100)
    assert energy == pytest.approx(1.0, abs=1e-9)
    assert_sum(full, [adapter], torch.tensor([1.0]))
    assert compress(weighted_sum([adapter], torch.zeros(1)), 1)[1] == 1.0


def test_written_folder_reads_back_with_its_record(tmp_path):
    merged = weighted_sum(UNEQUAL[:2], torch.tensor([0.25, 0.75]), name="mix")
    card = {"method": "fixed", "weights": {"a": 0.25, "b": 0.75}, "sources": [{"name": "a", "sha256": "f00d"}]}
    write_adapter(merged, tmp_path / "mix", card)
    again = read_adapter(tmp_path / "mix")
    assert again.name == "mix" and again.config == merged.config
    assert all(torch.equal(again.tensors[key], merged.tensors[key]) for key in merged.tensors)
    assert json.loads((tmp_path / "mix" / "merge.json").read_text()) == card
    readme = (tmp_path / "mix" / "README.md").read_text()
    assert all(text in readme for text in ('base_model: "tiny"', "`fixed`", "| a | `f00d` |", '"b": 0.75'))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [1]},
        {"invented_next_year": {"x": 1}},
        {"peft_type": "LOHA"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_inexact_adapters_are_refused(tmp_path, change):
    write_adapter(make_adapter("odd", 0, **change), tmp_path / "odd", {})
    with pytest.raises(ValueError, match=f"'odd'.*{next(iter(change))}"):
        read_adapter(tmp_path / "odd")


def test_tensors_that_are_no_factors_are_refused(tmp_path):
    write_adapter(make_adapter("odd", 0), tmp_path / "odd", {})
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({key: torch.zeros(2, 2)}, tmp_path / "odd" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=key):
        read_adapter(tmp_path / "odd")


def test_other_base_model_is_refused_with_both_names():
    with pytest.raises(ValueError, match="'a' and 'z' have different base models: .*'tiny' and 'big'"):
        weighted_sum([UNEQUAL[0], make_adapter("z", 1, base_model_name_or_path="big")], torch.ones(2))


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match=r"2 adapters need weights of shape \[2\], got \[3\]"):
        weighted_sum(UNEQUAL[:2], torch.ones(3))
    with pytest.raises(ValueError, match=r"no weights for the module 'model.layers.0.up_proj'"):
        weighted_sum(UNEQUAL[:2], {"model.layers.0.q_proj": torch.ones(2)})
    with pytest.raises(ValueError, match="no adapter given"):
        weighted_sum([], torch.ones(0))
