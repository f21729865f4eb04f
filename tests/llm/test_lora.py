"""Adapters: attached without side effects, saved as ordinary PEFT folders, selected and mixed by views."""

import json
from itertools import permutations

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.adapter_folders import base_model_name, read_adapter, same_base
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import (
    AdapterView,
    attach_lora,
    load_adapters,
    lora_modules,
    save_adapter,
)
from recbole_llm.llm.lora_targets import linear_layers
from tests.llm.families import build

IDS = torch.arange(2, 14).reshape(2, 6)  # [B, L]


def tiny_llama(seed=0, layers=2):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(num_hidden_layers=layers, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.name_or_path = "tiny"
    return model


def trainable_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora(model, name="x", seed=1, **changes):
    settings = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0} | changes
    return attach_lora(model, name=name, seed=seed, **settings)


def randomize(model, name, seed):
    """Give ``B`` values: a fresh adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        weight = layer.lora_B[name].weight
        weight.data = torch.randn(weight.shape, generator=generator)


@pytest.fixture
def folders(tmp_path):
    model = lora(lora(tiny_llama(), "x", 1), "y", 2, r=3, use_rslora=True)
    for seed, name in enumerate("xy"):
        randomize(model, name, seed)
        save_adapter(model, name, tmp_path / name)
    return {name: tmp_path / name for name in "xy"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_attach_is_seeded_and_leaves_the_global_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    base = tiny_llama()
    torch.set_rng_state(before)
    first = lora(base)
    assert torch.equal(torch.get_rng_state(), before)

    def factors(model):
        return [layer.lora_A["x"].weight for layer in lora_modules(model).values()]

    torch.manual_seed(6)
    assert all(map(torch.equal, factors(first), factors(lora(tiny_llama()))))
    assert not torch.equal(factors(first)[0], factors(lora(tiny_llama(), seed=2))[0])


def test_only_the_newest_adapter_trains():
    model = lora(lora(tiny_llama(), "x"), "y")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"y"}
    assert len(trainable_parameters(model)) == 2 * len(lora_modules(model)) == 2 * 14


def test_attach_twice_is_refused():
    with pytest.raises(ValueError, match="'x' is already attached"):
        lora(lora(tiny_llama()))


@pytest.mark.parametrize(
    ("family", "modules", "reason"),
    [
        (
            "gpt2",
            ["q_proj"],
            r"GPT2LMHeadModel has no module 'q_proj'; give all-linear or a list .*: c_attn, c_fc, c_proj$",
        ),
        ("llama", ["q_proj", "v_porj"], "has no module 'v_porj'; give all-linear or a list .*, v_proj"),
        ("llama", ["proj"], "has no module 'proj'"),
        ("llama", [], "it names none"),
        ("llama", ["q_proj", "embed_tokens"], "'model.embed_tokens' is no linear layer"),
        ("mamba", ["conv1d"], "'backbone.layers.0.mixer.conv1d' is no linear layer"),
        ("llama", "q_proj", "a text is a regular expression of whole names"),
        ("llama", "(", "a text is a regular expression of whole names"),
        (
            "mixtral",
            "all-linear",
            "lora_dropout: 0.1: peft cannot adapt .*lora_dropout.*; give a list .*'o_proj', 'q_proj', 'v",
        ),
        (
            "llama4_text",
            "all-linear",
            "by model.layers.0.feed_forward.router, which .*; give a list .*'o_proj', 'q_proj', 'v",
        ),
        ("phimoe", ["router", "q_proj"], "by model.layers.0.mlp.router, which .*; give a list .*'o_proj', 'q_proj', 'v_proj'"),
    ],
)
def test_modules_that_peft_cannot_adapt_are_named(family, modules, reason):
    """peft adapts what it finds of a list, and says nothing of a name that it does not find."""
    recipe = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "seed": 0}
    with pytest.raises(ValueError, match=rf"target_modules: .*{reason}"):
        attach_lora(build(family), name="x", target_modules=modules, **recipe)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next"])  # the latter has a shared expert, too
def test_the_layers_that_are_listed_take_a_lora(family: str) -> None:
    recipe = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "seed": 0}
    assert attach_lora(build(family), name="x", target_modules=linear_layers(build(family)), **recipe)


def test_the_part_of_an_lm_that_reads_images_is_not_adapted():
    """No text passes through it, so its adapter would stay as it was drawn, and be counted and saved."""
    recipe = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "seed": 0}
    model = build("gemma3")
    assert any("vision" in name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    for modules in ("all-linear", ["q_proj", "lm_head"]):
        adapted = attach_lora(build("gemma3"), name="x", target_modules=modules, **recipe)
        lm_loss(adapted, [Example.of(Prompt([5, 6, 7]), [8, 9])]).backward()
        assert all(layer.lora_B["x"].weight.grad is not None for layer in lora_modules(adapted).values())
        assert ("lm_head" in lora_modules(adapted)) == ("lm_head" in modules)


def test_experts_in_one_tensor_are_refused_before_the_training():
    """peft would train them, and the adapter could be neither evaluated nor merged."""
    recipe = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "seed": 0}
    reason = r"target_modules: all-linear: MixtralForCausalLM .* \(down_proj, gate.weight, gate_up_proj\).*'k_proj', 'o_proj'"
    with pytest.raises(ValueError, match=reason):
        attach_lora(build("mixtral"), name="x", target_modules="all-linear", **recipe)
    assert attach_lora(build("mixtral"), name="x", target_modules=["k_proj", "o_proj"], **recipe)


@pytest.mark.parametrize(
    ("modules", "adapted"),
    [(["q_proj", "layers.1.mlp.up_proj"], 5), (r".*\.1\..*(q|v)_proj", 2), (["lm_head"], 1), (["self_attn.v_proj"], 4)],
)
def test_modules_are_named_as_peft_reads_them(modules, adapted):
    recipe = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "seed": 0}
    model = attach_lora(build("llama"), name="x", target_modules=modules, **recipe)
    assert len(lora_modules(model)) == adapted
    attach_lora(model, name="y", target_modules=modules, **recipe)
    assert len(lora_modules(model)) == adapted


def test_attach_after_base_only_is_active():
    model = lora(tiny_llama())
    AdapterView(model).select()
    lora(model, "y")
    randomize(model, "y", 0)
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_saved_folder_is_an_ordinary_peft_folder(tmp_path):
    model = lora(tiny_llama())
    randomize(model, "x", 0)
    save_adapter(model, "x", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["inference_mode"]) == ("tiny", 2, True)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_second_adapter_names_its_base_model_too(folders):
    assert json.loads((folders["y"] / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_loaded_adapters_are_frozen_and_selectable(folders):
    model = load_adapters(tiny_llama(), folders)
    base = logits(tiny_llama())
    one = {name: logits(load_adapters(tiny_llama(), {name: folders[name]})) for name in folders}
    assert not trainable_parameters(model) and not model.training
    assert torch.equal(logits(model), one["x"])
    for name in ("y", None, "x"):
        view = AdapterView(model, {name: 1.0} if name else None)
        assert torch.equal(logits(view), base if name is None else one[name])
        assert not trainable_parameters(model)


def test_a_view_keeps_what_trains():
    model = lora(lora(tiny_llama(), "x"), "y")
    before = {id(p) for p in trainable_parameters(model)}
    for view in (AdapterView(model, {"x": 1.0}), AdapterView(model)):
        logits(view)
    assert {id(p) for p in trainable_parameters(model)} == before


def test_unknown_adapter_is_named(folders):
    model = load_adapters(tiny_llama(), folders)
    for coefficient in (1.0, torch.tensor(1.0), {}):
        with pytest.raises(ValueError, match=r"'c'.*\['x', 'y'\]"):
            AdapterView(model, {"x": 1.0, "c": coefficient})


@pytest.mark.parametrize("name", ["model", "0", "q_proj", "weight", "lora_A"])
def test_an_adapter_may_have_the_name_of_a_part_of_the_model(folders, name):
    """As a row of ``merge_beside`` may: peft's own list of tensors then lacks those of the other adapters."""
    model = load_adapters(tiny_llama(), {"z": folders["x"], name: folders["y"], "x": folders["x"]})
    for one, other in (("x", "x"), ("z", "x"), (name, "y")):
        assert torch.equal(logits(AdapterView(model, {one: 1.0})), logits(load_adapters(tiny_llama(), {"a": folders[other]})))


def test_different_base_models_are_refused(folders):
    file = folders["y"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "other"}))
    with pytest.raises(ValueError, match="'x' and 'y' have different base models: 'tiny' and 'other'"):
        load_adapters(tiny_llama(), folders)


@pytest.mark.parametrize("by_module", [False, True])
def test_adapters_of_different_targets_are_mixed(folders, tmp_path, by_module):
    """In a module that only one of them adapts, the mixture is that one's share."""
    narrow = lora(tiny_llama(), target_modules=["q_proj"], r=3, lora_alpha=5)
    randomize(narrow, "x", 3)
    save_adapter(narrow, "x", tmp_path / "q")
    both = {"x": folders["x"], "q": tmp_path / "q"}
    model, base = load_adapters(tiny_llama(), both), tiny_llama()
    weights = {"x": torch.tensor(0.4), "q": torch.tensor(0.6)}
    for name, folder in both.items():
        adapter = read_adapter(folder)
        for module in adapter.modules:
            a, b = adapter.factors(module)
            base.get_submodule(module).weight.data += weights[name] * b @ a
    view = {name: dict.fromkeys(lora_modules(model), w) for name, w in weights.items()} if by_module else weights
    torch.testing.assert_close(logits(AdapterView(model, view)), logits(base), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(AdapterView(model, {"q": 1.0})), logits(narrow), atol=1e-6, rtol=1e-5)


def test_pickled_or_missing_weights_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"not ours to open")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_adapters(tiny_llama(), {"x": tmp_path})


def test_adapter_of_a_deeper_model_is_refused(folders):
    with pytest.raises(ValueError, match="adapter 'x' in .* does not fit this model"):
        load_adapters(tiny_llama(layers=1), {"x": folders["x"]})


# -- views -------------------------------------------------------------------------------------------------------------


def test_mixture_ends_are_the_single_adapters(folders):
    model = load_adapters(tiny_llama(), folders)
    for weights, name in (((1.0, 0.0), "x"), ((0.0, 1.0), "y")):
        mixed = AdapterView(model, dict(zip("xy", torch.tensor(weights), strict=True)))
        torch.testing.assert_close(logits(mixed), logits(AdapterView(model, {name: 1.0})), atol=1e-6, rtol=1e-5)


def test_module_coefficients_equal_to_a_scalar_agree_with_it(folders):
    model = load_adapters(tiny_llama(), folders)
    scalar = {"x": torch.tensor(0.3), "y": torch.tensor(0.7)}
    by_module = {name: dict.fromkeys(lora_modules(model), w) for name, w in scalar.items()}
    assert torch.equal(logits(AdapterView(model, by_module)), logits(AdapterView(model, scalar)))


def test_a_mixture_is_the_sum_of_the_scaled_updates(folders):
    """``W + sum_i w_i s_i B_i A_i``, written into the weights of the base model by hand."""
    model, base = load_adapters(tiny_llama(), folders), tiny_llama()
    draw = torch.Generator().manual_seed(0)
    table = {name: {module: torch.rand((), generator=draw) for module in lora_modules(model)} for name in folders}
    for module, layer in lora_modules(model).items():
        for name in folders:
            base.get_submodule(module).weight.data += table[name][module] * layer.get_delta_weight(name)
    torch.testing.assert_close(logits(AdapterView(model, table)), logits(base), atol=1e-5, rtol=1e-5)


def test_module_coefficients_must_name_every_module(folders):
    model = load_adapters(tiny_llama(), folders)
    before = logits(model)
    with pytest.raises(ValueError, match="'x' must name its modules"):
        AdapterView(model, {"x": {}})
    assert torch.equal(logits(model), before)


def views_of(model):
    """Views of every kind, by name."""
    draw = torch.Generator().manual_seed(1)
    return {
        "base": AdapterView(model),
        "x": AdapterView(model, {"x": 1.0}),
        "y": AdapterView(model, {"y": 1.0}),
        "half": AdapterView(model, {"x": 0.5, "y": torch.tensor(0.5)}),
        "reversed": AdapterView(model, {"y": torch.tensor(2.0), "x": torch.tensor(-1.0)}),
        "modules": AdapterView(model, {"x": {module: torch.rand((), generator=draw) for module in lora_modules(model)}}),
    }


def test_views_do_not_disturb_each_other_in_any_order(folders):
    alone = {
        name: logits(views_of(load_adapters(tiny_llama(), folders))[name])
        for name in ("base", "x", "y", "half", "reversed", "modules")
    }
    assert len({found.sum().item() for found in alone.values()}) == len(alone)
    views = views_of(load_adapters(tiny_llama(), folders))
    for first, second in permutations(views, 2):
        logits(views[first])
        assert torch.equal(logits(views[second]), alone[second]), (first, second)


def test_a_view_after_an_error_within_another_computes_the_same(folders):
    model = load_adapters(tiny_llama(), folders)
    single, mixed = AdapterView(model, {"y": 1.0}), AdapterView(model, {"x": 0.5, "y": 0.5})
    before = logits(single)
    with pytest.raises(IndexError):
        mixed(input_ids=torch.tensor([[10**6]]))
    assert torch.equal(logits(single), before)
    assert not trainable_parameters(model)


def test_coefficients_of_one_restore_pefts_own_scaling(folders):
    model = load_adapters(tiny_llama(), folders)
    own = [dict(layer.scaling) for layer in lora_modules(model).values()]
    AdapterView(model, {"x": torch.tensor(0.5, requires_grad=True), "y": 0.25}).select()
    assert [layer.scaling for layer in lora_modules(model).values()] != own
    AdapterView(model, {"x": 1.0, "y": 1.0}).select()
    assert [layer.scaling for layer in lora_modules(model).values()] == own
    assert all(isinstance(scale, float) for layer in lora_modules(model).values() for scale in layer.scaling.values())


def test_the_later_coefficient_is_read_at_the_call(folders):
    """Merging optimises its coefficients in place: a view holds the tensor, not its value."""
    model, weight = load_adapters(tiny_llama(), folders), torch.tensor(0.0)
    view = AdapterView(model, {"x": weight})
    before = logits(view)
    weight.fill_(1.0)
    assert torch.equal(logits(view), logits(AdapterView(model, {"x": 1.0}))) and not torch.equal(before, logits(view))


@pytest.mark.parametrize("granularity", ["adapter", "module"])
def test_gradient_reaches_coefficients_only(folders, granularity):
    model = load_adapters(tiny_llama(), folders)
    names = {"adapter": [None], "module": list(lora_modules(model))}[granularity]
    weights = {name: {module: torch.tensor(0.5, requires_grad=True) for module in names} for name in folders}
    view = AdapterView(model, {name: own[None] if granularity == "adapter" else own for name, own in weights.items()})
    view(input_ids=IDS).logits.square().mean().backward()
    found = [weight.grad for own in weights.values() for weight in own.values()]
    assert all(gradient is not None for gradient in found) and sum(gradient != 0 for gradient in found) >= len(found) - 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_view_has_what_a_scorer_asks_of_a_model(folders):
    model = load_adapters(tiny_llama(), folders)
    view = AdapterView(model, {"x": 1.0})
    assert view.config is model.config and view.get_input_embeddings() is model.get_input_embeddings()


def test_a_base_model_that_was_moved_is_the_same_one() -> None:
    names = [base_model_name({"base_model_name_or_path": base}) for base in ("/a/lm", "/b/c/lm", "org/lm", None)]
    assert names == ["lm", "lm", "org/lm", None]
    cached = "/home/me/.cache/hub/models--org--lm/snapshots/0123456789012345678901234567890123456789"
    assert base_model_name({"base_model_name_or_path": cached}) == "org/lm"
    gguf = ["/saved/llm/LM.Q4_1-0123456789ab", "/saved/llm/LM.Q4_1-ba9876543210"]  # by other versions of the libraries
    assert {base_model_name({"base_model_name_or_path": base}) for base in gguf} == {"LM.Q4_1"}
    same = [("lm", "org/lm"), ("org/LM", "lm"), ("lm", "lm"), (None, None)]
    other = [("org/lm", "you/lm"), ("lm", "lm2"), (None, "lm"), ("builtin-lm-0123456789ab", "builtin-lm-ba9876543210")]
    assert all(same_base(*pair) for pair in same) and not any(same_base(*pair) for pair in other)
