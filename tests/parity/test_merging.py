"""Merging against its oracles: the live mixture, peft's own loading and ``cat``, finite differences."""

import hashlib

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.llm.lora import AdapterView, attach_lora, load_adapters, lora_modules, save_adapter
from recbole_llm.merging.arithmetic import weighted_sum, write_adapter
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.objectives import Counted, candidate_entropy, first_tokens_entropy, mean_over_batches
from recbole_llm.merging.stage import merge_adapters

IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))  # [B, L]
ADAPTERS = {"x": {"r": 2, "lora_alpha": 5}, "y": {"r": 4, "lora_alpha": 6}, "z": {"r": 3, "lora_alpha": 3}}


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.15, **sizes)).eval()
    model.name_or_path = "tiny"
    return model


def write_adapters(root, **common):
    model = tiny_llama()
    for seed, (name, ranks) in enumerate(ADAPTERS.items()):
        model = attach_lora(model, name=name, seed=seed, lora_dropout=0.05, **ranks, **common)
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_modules(model).values():
            weight = layer.lora_B[name].weight
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        save_adapter(model, name, root / name)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def folders(request, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), use_rslora=request.param)


@pytest.fixture(scope="module")
def live(folders):
    return load_adapters(tiny_llama(), folders)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_module(live, seed):
    modules = list(lora_modules(live))
    return modules, torch.rand(len(modules), len(ADAPTERS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_exported_merge_in_vanilla_peft_equals_the_live_mixture(folders, live, tmp_path, granularity):
    modules, rows = by_module(live, 1)
    weights = rows if granularity == "module" else torch.tensor([0.6, 0.5, -0.2])
    problem = MergeProblem(list(ADAPTERS), modules, granularity)
    expected = logits(AdapterView(live, problem.by_name(weights)))
    table = dict(zip(modules, weights, strict=True)) if granularity == "module" else weights
    write_adapter(weighted_sum([read_adapter(folder) for folder in folders.values()], table), tmp_path, {})
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    folded = merged.merge_and_unload()
    torch.testing.assert_close(logits(folded), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(tiny_llama())).abs().max() > 0.1


def test_merge_of_unlike_targets_loads_without_a_stray_module(tmp_path):
    first = write_adapters(tmp_path / "all")["x"]
    one = {"target_modules": ["model.layers.1.self_attn.q_proj"], "r": 2, "lora_alpha": 2, "lora_dropout": 0.0}
    model = attach_lora(tiny_llama(), name="q", seed=9, **one)
    (layer,) = lora_modules(model).values()
    layer.lora_B["q"].weight.data.normal_(generator=torch.Generator().manual_seed(9))
    save_adapter(model, "q", tmp_path / "q")
    sources = [read_adapter(first, "x"), read_adapter(tmp_path / "q", "q")]
    write_adapter(weighted_sum(sources, torch.tensor([0.5, 1.5])), tmp_path / "merged", {})
    merged = load_adapters(tiny_llama(), {"m": tmp_path / "merged"}).merge_and_unload().state_dict()
    base = tiny_llama().state_dict()
    for w, source in zip((0.5, 1.5), sources, strict=True):
        for module in source.modules:
            a, b = source.factors(module)
            base[f"{module}.weight"] += w * b @ a
    for key, weight in base.items():
        torch.testing.assert_close(merged[key], weight, atol=1e-5, rtol=1e-5)


def test_peft_cat_is_the_same_sum(tmp_path):
    live = load_adapters(tiny_llama(), write_adapters(tmp_path))
    weights = [0.6, 0.3, 0.1]
    live.add_weighted_adapter(list(ADAPTERS), weights, "oracle", combination_type="cat")
    merged = weighted_sum([read_adapter(tmp_path / name) for name in ADAPTERS], torch.tensor(weights))
    for module, layer in lora_modules(live).items():
        expected = layer.get_delta_weight("oracle")
        a, b = merged.factors(module)
        assert (b @ a - expected).norm() / expected.norm() <= 1e-6


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_gradient_of_the_coefficients_equals_central_differences(live, granularity):
    modules, rows = by_module(live, 2)
    problem = MergeProblem(list(ADAPTERS), modules, granularity)

    def objective(weights):
        logits = AdapterView(live, problem.by_name(weights))(input_ids=IDS).logits[:, -1, :10].double()  # [B, C]
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()

    weights = (rows if granularity == "module" else rows[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(weights), weights)
    for seed in range(3):
        direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
        direction = direction + gradient / gradient.norm()  # not by chance across the gradient
        step = 1e-2 / direction.norm()
        with torch.no_grad():
            at = {i: objective(weights + i * step * direction) for i in (-2, -1, 1, 2)}
        difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)  # central, of fourth order
        torch.testing.assert_close(difference.item(), (gradient * direction).sum().item(), rtol=1e-3, atol=0)


def frozen_bytes(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("granularity", ["global", "module"])
@pytest.mark.parametrize("kind", ["candidates", "tokens"])
def test_entropy_merge_end_to_end(folders, live, tmp_path, granularity, kind):
    problem = MergeProblem(list(ADAPTERS), list(lora_modules(live)), granularity, settings={"steps": 3, "points": 6})

    def term(weights, prompts):
        view = AdapterView(live, problem.by_name(weights))
        if kind == "tokens":
            return first_tokens_entropy(view, prompts.tolist(), Counted(2), pad_token_id=0)
        return candidate_entropy(view(input_ids=prompts).logits[:, -1, :10])

    objective = mean_over_batches(term, IDS.split(2))
    problem = MergeProblem(problem.names, problem.modules, granularity, objective, settings=problem.settings)
    before = frozen_bytes(live)
    result = merge_adapters(folders, "entropy", problem, tmp_path / "merged")
    assert frozen_bytes(live) == before and all(p.grad is None for p in live.parameters())
    with torch.no_grad():
        reached = objective(result.weights).item()
    assert all(reached <= point["entropy"] + 1e-6 for point in result.trace)
    expected = logits(AdapterView(live, problem.by_name(result.weights)))
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune", "orthogonal_residual", "uniform", "factors"])
def test_export_of_every_method_is_the_base_plus_its_dense_delta(folders, tmp_path, method):
    chosen = folders
    if method == "factors":  # equal ranks
        chosen = {"x": folders["x"], "y": tmp_path / "y"}
        source = read_adapter(folders["x"])
        twisted = {key: tensor.flip(1) for key, tensor in source.tensors.items()}
        write_adapter(Adapter(source.config, twisted, "y"), chosen["y"], {})
    merge_adapters(chosen, method, MergeProblem(list(chosen), []), tmp_path / "merged")
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")
    base = tiny_llama()
    merged, weights = read_adapter(tmp_path / "merged"), base.state_dict()
    changed = 0.0
    for module in merged.modules:
        a, b = merged.factors(module)
        weights[f"{module}.weight"] += b @ a
        changed += (b @ a).norm().item()
    assert changed > 0.1
    torch.testing.assert_close(logits(exported), logits(base), atol=1e-5, rtol=1e-5)
