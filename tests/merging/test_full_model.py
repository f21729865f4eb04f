"""The full model gives the logits of base model + adapter, in the dtype of the base, without peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recbole_llm import cli
from recbole_llm.llm.adapter_folders import read_adapter
from recbole_llm.llm.folding import rounded
from recbole_llm.llm.lora import attach_lora, lora_modules, save_adapter
from recbole_llm.merging.full_model import fold, write_full_model
from tests.conftest import write_lm

IDS = torch.arange(3, 19).reshape(2, 8)  # [B, T]


def adapter(base: Path, folder: Path, seed: int, **changes: object) -> Path:
    """A PEFT folder with random values for a base model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **changes}
    model = attach_lora(model, name="x", seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        weight = layer.lora_B["x"].weight
        weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    save_adapter(model, "x", folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def base_in(tiny_lm: Path, folder: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    return folder


def test_it_has_the_logits_of_base_and_adapter(tiny_lm: Path, tmp_path: Path) -> None:
    lora = adapter(tiny_lm, tmp_path / "lora", 1, use_rslora=True)
    said = write_full_model(tiny_lm, lora, tmp_path / "full", max_shard_size="20KB")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), lora))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_lm))).abs().max() > 0.1
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1 and "float32" in said  # sharded by transformers
    one, two = (AutoTokenizer.from_pretrained(path) for path in (tiny_lm, tmp_path / "full"))
    assert one.get_vocab() == two.get_vocab() and one.pad_token == two.pad_token


def test_a_damaged_one_is_written_again(tiny_lm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora, full = adapter(tiny_lm, tmp_path / "lora", 1), tmp_path / "full"
    write_full_model(tiny_lm, lora, full)
    assert "as written before" in write_full_model(tiny_lm, lora, full)
    whole = (full / "model.safetensors").read_bytes()
    (full / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "as written before" not in write_full_model(tiny_lm, lora, full)
    assert (full / "model.safetensors").read_bytes() == whole
    assert "model.safetensors: its SHA-256 is not the one in MANIFEST.json; it is written again" in caplog.text


def test_bfloat16_is_rounded_once(tiny_lm: Path, tmp_path: Path) -> None:
    """The weights are those of the fp32 sum, rounded without bias; adding in bf16 gives others."""
    base = base_in(tiny_lm, tmp_path / "base", torch.bfloat16)
    lora = adapter(base, tmp_path / "lora", 2)
    write_full_model(base, lora, tmp_path / "full")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto")
    assert found.dtype == torch.bfloat16 and json.loads((tmp_path / "full" / "config.json").read_text())["dtype"] == "bfloat16"
    plain, given = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), read_adapter(lora)
    differs = 0
    for module in given.modules:
        a, b = given.factors(module)
        weight = plain.get_submodule(module).weight
        expected = rounded(weight.float() + b @ a, torch.bfloat16).bfloat16()
        assert torch.equal(found.get_submodule(module).weight, expected)
        differs += int((expected != weight + (b.bfloat16() @ a.bfloat16())).sum())
    assert differs > 0
    live = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora))
    torch.testing.assert_close(logits(found.float()), live, atol=0.15, rtol=0.05)


def test_transposed_layers_are_folded_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [D_in, D_out]; rectangular matrices would not even fit."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(tmp_path / "base")
    lora = adapter(tmp_path / "base", tmp_path / "lora", 3, target_modules=["c_attn", "c_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora))
    fold(model, read_adapter(lora))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_tied_output_matrix_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    lora = adapter(tmp_path / "base", tmp_path / "lora", 3, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head, whose matrix the base model also uses as transformer.wte"):
        fold(model, read_adapter(lora))


def test_a_layer_that_is_used_twice_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    """As in Zamba2: its update would be folded into the layer's other use, too."""
    lora = adapter(tiny_lm, tmp_path / "lora", 3, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(ValueError, match="0.self_attn.q_proj, whose matrix the base model also uses as model.layers.1.self_attn"):
        fold(model, read_adapter(lora))


def test_the_command_writes_adapter_and_full_model(tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loras = [adapter(tiny_lm, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    out, full = tmp_path / "merged", tmp_path / "full"
    adapters = f"--adapters={loras[0]} {loras[1]}"
    cli.main(["merge", adapters, f"--out={out}", f"--full_model={full}"])
    assert "rank 6" in capsys.readouterr().out
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), out)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(full)), logits(merged), atol=1e-4, rtol=1e-4)
    assert json.loads((full / "merge.json").read_text())["weights"] == {"a": 0.5, "b": 0.5}

    for more, message in (
        ([f"--full_model={full}"], "is not overwritten"),
        ([f"--full_model={tmp_path / 'new'}", f"--base_model={tmp_path / 'none'}"], "--base_model=FOLDER_OR_HUB_ID"),
        ([f"--base_model={tiny_lm}"], "--base_model has no effect without --full_model"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["merge", adapters, f"--out={tmp_path / 'other'}", *more])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists() and not (tmp_path / "new").exists()


def test_an_adapter_of_another_size_is_refused_before_anything_is_merged(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = adapter(tiny_lm, tmp_path / "a", 1)
    other = write_lm(tmp_path / "wider", hidden=48)
    with pytest.raises(SystemExit):
        cli.main(
            ["merge", f"--adapters={lora}", f"--out={tmp_path / 'm'}", f"--full_model={tmp_path / 'f'}", f"--base_model={other}"]
        )
    said = capsys.readouterr().err
    assert "does not fit the backbone, a llama: model.layers.0.mlp.down_proj.lora_A.weight" in said
    assert "[3, 64]" in said and "[3, 96]" in said
    assert not (tmp_path / "m").exists() and not (tmp_path / "f").exists()
