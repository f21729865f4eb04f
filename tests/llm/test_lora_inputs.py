"""One mask for all layers that read an input: the right share, scale and gradient, and the numbers of peft without dropout."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.llm.lora import attach_lora, lora_modules
from recbole_llm.llm.lora_inputs import SharedInputs


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config).to(dtype)
    found = attach_lora(model, name="x", **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "seed": 0} | settings)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return found.train()


def test_the_share_the_scale_and_the_gradient_are_those_of_dropout() -> None:
    torch.manual_seed(0)
    shared, x = SharedInputs(0.3, torch.float32).train(), torch.ones(300, 301, requires_grad=True)
    dropped = shared(x)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert dropped[kept].unique().tolist() == pytest.approx([1 / 0.7], abs=1e-4)
    columns = kept.float().mean(0)
    assert columns.std().item() == pytest.approx((0.3 * 0.7 / 300) ** 0.5, rel=0.15)  # independent draws
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_layers_that_read_one_input_read_one_mask_and_another_pass_draws_another() -> None:
    model, seen = build(), []
    for name, layer in lora_modules(model).items():
        layer.lora_A["x"].register_forward_pre_hook(lambda _, given, name=name: seen.append((name, given[0])))
    model(torch.arange(20)[None])
    by_layer = dict(seen)
    for block in ("model.layers.0", "model.layers.1"):
        query, key, value = (by_layer[f"{block}.self_attn.{part}_proj"] for part in "qkv")
        assert query is key is value
        assert by_layer[f"{block}.mlp.gate_proj"] is by_layer[f"{block}.mlp.up_proj"]
    assert len({id(tensor) for _, tensor in seen}) == 2 * 4
    masks = [(by_layer[f"model.layers.{block}.self_attn.q_proj"] == 0) for block in (0, 1)]
    assert not torch.equal(*masks) and all(0.2 < mask.float().mean() < 0.4 for mask in masks)
    seen.clear()
    model(torch.arange(20)[None])
    assert not torch.equal(dict(seen)["model.layers.0.self_attn.q_proj"] == 0, masks[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_without_dropout_the_numbers_are_those_of_peft(dtype: torch.dtype, training: bool) -> None:
    shared, plain = build(dtype, lora_dropout=0.0), build(dtype, lora_dropout=0.0)
    for layer in lora_modules(plain).values():
        layer.lora_dropout["x"], layer.cast_input_dtype_enabled = torch.nn.Identity(), True
    tokens = torch.arange(20)[None]
    found, expected = (model.train(training)(tokens).logits for model in (shared, plain))
    assert torch.equal(found, expected) and found.dtype == dtype
    if dtype == torch.float32:  # in bfloat16 ours are closer: gradients of the readers add up before they are rounded
        trained = [[p for p in model.parameters() if p.requires_grad] for model in (shared, plain)]
        gradients = [
            torch.autograd.grad(logits.square().sum(), some) for logits, some in zip((found, expected), trained, strict=True)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_nothing_is_kept_after_a_pass() -> None:
    model = build()
    model(torch.arange(20)[None]).logits.sum().backward()
    (shared,) = {module for module in model.modules() if isinstance(module, SharedInputs)}
    assert shared._last is None


def test_adapters_draw_masks_of_their_own() -> None:
    model = build(torch.bfloat16)
    attach_lora(model, name="y", r=4, lora_alpha=8, lora_dropout=0.3, seed=1)
    model.base_model.set_adapter(["x", "y"])
    layer, seen = lora_modules(model)["model.layers.0.mlp.down_proj"], []
    for name in "xy":
        layer.lora_A[name].register_forward_pre_hook(lambda _, given: seen.append(given[0] == 0))
    assert model.train()(torch.arange(5)[None]).logits.isfinite().all()
    assert not torch.equal(*seen)
