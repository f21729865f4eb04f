"""A GGUF file is dequantised once into an ordinary folder, and runs as that folder does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from transformers.quantizers import quantizer_gguf

from recbole_llm.llm import backbones, gguf_file
from recbole_llm.llm.backbones import Backbone, BackboneSettings
from recbole_llm.llm.gguf_file import dequantised, gguf_name, is_gguf
from recbole_llm.store.stages import StageCache

gguf = pytest.importorskip("gguf")

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<unk>", "<s>", "</s>", "Ġ", *ascii_lowercase, "ab"]


def write_gguf(
    file: Path, architecture: str = "llama", kind: Any = None, template: str | None = None, layers: int = LAYERS
) -> dict[str, np.ndarray]:
    """A tiny Llama with random weights in blocks of ``kind`` (Q4_1); returns the dequantised arrays by GGUF name.

    layers: number of layers that have weights; the header always says two.
    """
    kind = kind or gguf.GGMLQuantizationType.Q4_1
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(str(file), architecture)
    writer.add_name("Tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)
    key_width = WIDTH * KV_HEADS // HEADS
    shapes = {"token_embd": (len(TOKENS), WIDTH)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH)}
        shapes |= {f"blk.{i}.attn_k": (key_width, WIDTH), f"blk.{i}.attn_v": (key_width, WIDTH)}
        shapes |= {f"blk.{i}.ffn_gate": (INNER, WIDTH), f"blk.{i}.ffn_up": (INNER, WIDTH), f"blk.{i}.ffn_down": (WIDTH, INNER)}
    exact: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), kind)
        exact[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(layers) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-Chat.Q4_1.gguf"
    write_gguf(path)
    return path


def settings_of(path: Path | str, saved: Path, **changes: Any) -> BackboneSettings:
    return replace(BackboneSettings(str(path), None, "auto", "cpu", None, None, False, str(saved)), **changes)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct Q4_1"),
        ("Qwen2-7B-Instruct-Q4_K_M.gguf", "Qwen2-7B-Instruct Q4_K_M"),
        ("llama-IQ3_XS.gguf", "llama IQ3_XS"),
        ("model.F16.gguf", "model F16"),
        ("plain.GGUF", "plain"),
    ],
)
def test_tables_show_the_model_and_its_quantisation(name: str, shown: str) -> None:
    assert is_gguf(name) and gguf_name(Path(name)) == shown


def test_the_weights_are_those_of_the_blocks(tmp_path: Path) -> None:
    exact = write_gguf(tmp_path / "tiny.gguf")
    folder = dequantised(tmp_path / "tiny.gguf", tmp_path / "llm")
    causal = backbones.load_causal_lm(folder, device="cpu")
    layer = causal.model.model.layers[1]
    found = {
        "token_embd": causal.model.get_input_embeddings().weight,
        "blk.1.attn_v": layer.self_attn.v_proj.weight,  # q and k are permuted in the file
        "blk.1.ffn_down": layer.mlp.down_proj.weight,
    }
    for name, weight in found.items():
        assert np.array_equal(weight.numpy(), exact[name]), name
    assert getattr(causal.model.config, "quantization_config", None) is None
    assert causal.model.config.max_position_embeddings == 256
    assert causal.tokenizer.tokenize("abc a") == ["ab", "c", "Ġ", "a"]


def test_a_backbone_is_a_gguf_file_named_in_tables_and_dequantised_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone(settings_of(file, tmp_path / "saved"))
    assert backbone.name == "Tiny-Chat Q4_1" and backbone.stages == () and not (tmp_path / "saved").exists()
    causal = backbone.load(StageCache(tmp_path))
    assert causal.model.dtype == torch.float32 and backbone.tokenizer.eos_token == "</s>"
    (folder,) = (path for path in (tmp_path / "saved" / "llm").iterdir() if path.is_dir())
    assert json.loads((folder / gguf_file.SOURCE).read_text())["file"] == file.name

    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("it was dequantised again"))
    again = Backbone(settings_of(file, tmp_path / "saved"))
    assert again.fingerprint == backbone.fingerprint and torch.equal(
        again.load(StageCache(tmp_path)).model.get_input_embeddings().weight, causal.model.get_input_embeddings().weight
    )


def test_every_weight_is_dequantised_whatever_kernels_there_are(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the package ``kernels``, transformers would leave blocks packed, which cannot be saved; it warned of either."""
    monkeypatch.setattr(quantizer_gguf, "get_gguf_kernel", lambda: pytest.fail("a kernel for packed blocks was asked for"))
    monkeypatch.setattr(quantizer_gguf.logger, "warning", lambda text, *_: pytest.fail(text))
    dequantised(file, tmp_path / "llm")


def test_every_dtype_is_loaded_from_the_same_folder(file: Path, tmp_path: Path) -> None:
    """So a shared run that was trained in bfloat16 can be read in float32; the fingerprints of stages differ."""
    exact, half = (Backbone(settings_of(file, tmp_path / "saved", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half.identity == exact.identity and half.base_name == exact.base_name and half.fingerprint != exact.fingerprint
    models = [backbone.load(StageCache(tmp_path)).model for backbone in (exact, half)]
    for own, rounded in zip(*(model.parameters() for model in models), strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, own.bfloat16())


def test_another_file_is_another_folder(file: Path, tmp_path: Path) -> None:
    first = dequantised(file, tmp_path / "llm")
    write_gguf(file, kind=gguf.GGMLQuantizationType.Q8_0)
    assert dequantised(file, tmp_path / "llm") != first


def test_a_damaged_folder_is_made_again(file: Path, tmp_path: Path) -> None:
    folder = dequantised(file, tmp_path / "llm")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert dequantised(file, tmp_path / "llm") == folder
    assert (folder / "model.safetensors").read_bytes() == content


def test_what_a_killed_process_left_is_removed(file: Path, tmp_path: Path) -> None:
    folder = dequantised(file, tmp_path / "llm")
    left = folder.with_name(f".{folder.name}.x.tmp")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert dequantised(file, tmp_path / "llm") == folder and not left.exists()


def test_the_chat_template_of_the_file_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "chat.gguf", template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = Backbone(settings_of(tmp_path / "chat.gguf", tmp_path / "saved")).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


def test_what_cannot_be_read_is_refused_by_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"llm_path: there is no file .*absent\.gguf"):
        Backbone(settings_of(tmp_path / "absent.gguf", tmp_path)).fingerprint  # noqa: B018
    write_gguf(tmp_path / "odd.gguf", architecture="no-such-family")
    write_gguf(tmp_path / "half.gguf", layers=1)
    whole = file.read_bytes()
    for name, content in {"cut.gguf": whole[:2000], "short.gguf": whole[:-2000], "text.gguf": b"no weights"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("cut.gguf", "short.gguf", "text.gguf", "odd.gguf", "half.gguf"):
        with pytest.raises(ValueError, match=rf"llm_path: .*{name} cannot be read \(.+\).*a family that transformers reads"):
            dequantised(tmp_path / name, tmp_path / "llm")
    assert not any(path.is_dir() for path in (tmp_path / "llm").iterdir())
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"llm_path: Tiny-Chat\.Q4_1\.gguf is read with .*; run `pip install gguf`"):
        dequantised(file, tmp_path / "llm")
