"""Adapters folded into the base model's weights: the same scores at the base model's cost, and exact originals afterwards."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from recbole_llm.llm import folding
from recbole_llm.llm.folding import Folding
from recbole_llm.llm.lora import AdapterView, attach_lora, load_adapters, lora_modules, save_adapter, unload

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
SETTINGS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "seed": 0}
FAMILIES = ["llama", "llama-gqa", "qwen2-gqa", "opt", "gpt2"]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def trained(model, name: str, folder: Path, **changes) -> Path:
    """An adapter with random weights."""
    peft_model = attach_lora(model, name=name, **SETTINGS | changes)
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    save_adapter(peft_model, name, folder)
    return folder


@pytest.fixture
def folders(build_model, family, tmp_path) -> dict[str, Path]:
    return {name: trained(build_model(family), name, tmp_path / name) for name in "xy"}


def logits(view) -> torch.Tensor:
    return view(input_ids=IDS).logits


def state(model) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key}


def views(model, fold: bool) -> dict[str, AdapterView]:
    draw = torch.Generator().manual_seed(1)
    weights = {
        "x": {"x": 1.0},
        "y": {"y": 1.0},
        "half": {"x": 0.5, "y": torch.tensor(0.5)},
        "none": {},
        "modules": {"x": {module: torch.rand((), generator=draw) for module in lora_modules(model)}},
    }
    return {name: AdapterView(model, adapters, fold=fold) for name, adapters in weights.items()}


@torch.no_grad()
def test_a_folded_view_computes_what_an_unfolded_one_does_and_gives_the_weights_back(build_model, family, folders):
    model = load_adapters(build_model(family), folders)
    own, loose, folded = state(model), views(model, False), views(model, True)
    for name in ("x", "half", "none", "y", "modules", "x"):
        expected = logits(loose[name])
        assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())
        torch.testing.assert_close(logits(folded[name]), expected, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items()) == (name == "none")
    base = model.get_base_model()
    unload(model)
    assert torch.equal(base(input_ids=IDS).logits, build_model(family)(input_ids=IDS).logits)


@torch.no_grad()
def test_a_folding_that_fails_midway_gives_the_weights_back(build_model, family, folders, monkeypatch):
    model = load_adapters(build_model(family), folders)
    own, expected = state(model), logits(AdapterView(model, {"x": 1.0}))
    last = list(lora_modules(model).values())[-1]
    monkeypatch.setattr(last, "get_delta_weight", lambda _: 1 / 0)  # in place of running out of memory
    with pytest.raises(ZeroDivisionError):
        AdapterView(model, {"x": 1.0}, fold=True)(input_ids=IDS)
    assert not all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())
    assert torch.equal(logits(AdapterView(model, {"x": 1.0})), expected)
    assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_hundred_foldings_do_not_drift(build_model, family, folders, dtype):
    model = load_adapters(build_model(family).to(dtype), folders)
    own, single, none = state(model), AdapterView(model, {"x": 1.0}, fold=True), AdapterView(model, fold=True)
    first = logits(single)
    for _ in range(100):
        none.select()
        single.select()
    assert torch.equal(logits(single), first)
    none.select()
    assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_update_smaller_than_a_step_of_the_weights_is_not_lost(build_model, family, folders, dtype):
    """Most entries of an adapter are; rounded to the nearest weight, none of these would change any."""
    model = load_adapters(build_model(family).to(dtype), folders)
    own, scale = state(model), 0.02 * torch.finfo(dtype).eps
    AdapterView(model, {"x": scale}, fold=True).select()
    sizes, kept = [], []
    for name, layer in lora_modules(model).items():
        before = own[f"base_model.model.{name}.base_layer.weight"].float()
        change, update = layer.get_base_layer().weight.float() - before, layer.get_delta_weight("x").float()
        step = torch.finfo(dtype).eps * 2 ** before.abs().log2().floor()
        small = update.abs() < step / 4
        assert (change.abs() <= step)[small].all()
        sizes.append(float(update[small].square().sum()))
        kept.append(float((change * update)[small].sum()))
    assert sum(kept) / sum(sizes) == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_a_folded_view_costs_what_the_base_model_costs(build_model, family, folders):
    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    bare, model = build_model(family), load_adapters(build_model(family), folders)
    merged, beside = AdapterView(model, {"x": 0.5, "y": 0.5}, fold=True), AdapterView(model, {"x": 0.5, "y": 0.5})
    merged.select()
    assert flops(lambda: logits(merged)) == flops(lambda: bare(input_ids=IDS)) < flops(lambda: logits(beside))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_with_gradients_nothing_is_folded(build_model, family, folders):
    model, weight = load_adapters(build_model(family), folders), torch.tensor(0.5, requires_grad=True)
    own, view = state(model), AdapterView(model, {"x": weight}, fold=True)
    logits(view).sum().backward()
    assert weight.grad and all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())
    with torch.no_grad():
        folded = logits(view)
    torch.testing.assert_close(folded, logits(view), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_cannot_be_folded_exactly_stays_beside_the_weights(build_model, family, folders, tmp_path, monkeypatch):
    tied = build_model("llama-gqa")  # its output layer is its embedding
    head = trained(tied, "head", tmp_path / "head", target_modules=["lm_head", "q_proj"])
    tied = load_adapters(build_model("llama-gqa"), {"head": head})
    dora = get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora").eval()
    biased = get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "biased").eval()
    for model in (tied, dora, biased):
        (name,), own = model.peft_config, state(model)
        assert not Folding(model.base_model.model, lora_modules(model)).possible
        assert torch.equal(logits(AdapterView(model, {name: 1.0}, fold=True)), logits(AdapterView(model, {name: 1.0})))
        assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())

    model = load_adapters(build_model("llama"), folders)
    monkeypatch.setattr(folding, "available_memory_bytes", lambda: 1000)
    own = state(model)
    logits(AdapterView(model, {"x": 1.0}, fold=True))
    assert all(torch.equal(tensor, own[key]) for key, tensor in state(model).items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_adapters_are_selected_when_the_selection_changes_and_not_at_every_call(build_model, family, folders, monkeypatch):
    model, calls = load_adapters(build_model(family), folders), []
    walks = type(model).parameters, Folding.fold
    monkeypatch.setattr(type(model), "parameters", lambda self, **keywords: calls.append("walk") or walks[0](self, **keywords))
    monkeypatch.setattr(Folding, "fold", lambda self, names: calls.append("fold") or walks[1](self, names))
    for fold in (False, True):
        one, two = AdapterView(model, {"y": 1.0}, fold=fold), AdapterView(model, {"x": 1.0}, fold=fold)
        calls.clear()
        for view in (one, one, one, two, two):
            logits(view)
        assert calls == (["walk", "fold", "fold"] if fold else ["walk", "walk"])
