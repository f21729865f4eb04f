"""The count of activations is that of the tensors which autograd saves; free memory is what the device or max_memory says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import memory as module
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import attach_lora
from recbole_llm.llm.memory import TrainingMemory, checkpoints, free_memory, micro_batch_tokens, training_memory
from recbole_llm.llm.micro_batches import bounded_memory
from recbole_llm.training.loop import LoopOptions

CPU = torch.device("cpu")
SIZES = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, vocab_size=200, max_position_embeddings=512)
SHAPES = {  # as SmolLM2 and Qwen2.5-0.5B, in small
    "llama": LlamaConfig(**SIZES, intermediate_size=256, num_hidden_layers=4),
    "qwen": Qwen2Config(**SIZES, intermediate_size=520, num_hidden_layers=3, use_sliding_window=False),
}


def build(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = (LlamaForCausalLM if name == "llama" else Qwen2ForCausalLM)(SHAPES[name])
    return model.to(dtype).requires_grad_(False)


def saved_bytes(model: Any, tokens: int, soft: torch.Tensor | None = None) -> int:
    """Bytes that autograd keeps for a row of ``tokens`` input tokens, without weights; every token is an answer."""
    found: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = Prompt([5] * (tokens + 1), {} if soft is None else {0: 0})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lm_loss(model, [Example(row, [1] * (tokens + 1))], soft=soft)
    del loss
    return sum(found.values())


def per_token(model: Any, soft: torch.Tensor | None = None) -> float:
    saved_bytes(model, 8, soft)  # the first loss also tries the head
    return (saved_bytes(model, 256, soft) - saved_bytes(model, 128, soft)) / 128


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("qwen", torch.float32), ("llama", torch.bfloat16)])
def test_the_activations_of_lora_are_those_that_autograd_saves(name: str, dtype: torch.dtype, dropout: float) -> None:
    model = attach_lora(build(name, dtype), name="x", r=8, lora_alpha=8, lora_dropout=dropout, seed=0).train()
    expected = training_memory(SHAPES[name], dtype=dtype, r=8, dropout=dropout).per_token
    assert per_token(model) == pytest.approx(expected, rel=0.05)


def test_the_activations_of_soft_tokens_are_those_that_autograd_saves() -> None:
    model, soft = build("llama", torch.float32), torch.zeros(1, 96, requires_grad=True)
    assert per_token(model, soft) == pytest.approx(training_memory(SHAPES["llama"]).per_token, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_the_layers(tmp_path: Any) -> None:
    lm = build("llama", torch.float32)
    model = attach_lora(lm, name="x", r=8, lora_alpha=8, lora_dropout=0.1, seed=0).train()
    whole = per_token(model)
    with bounded_memory(lm, LoopOptions(gradient_checkpointing=True), tmp_path):
        kept = per_token(model)
    config = SHAPES["llama"]
    assert kept == pytest.approx((config.num_hidden_layers + 2) * config.hidden_size * 4, rel=0.05)
    assert training_memory(config, r=8, dropout=0.1, checkpointing=True).per_token == pytest.approx(kept + whole / 4, rel=0.1)


@pytest.mark.parametrize(
    "config", [OPTConfig(), GPT2Config(), MixtralConfig(), MambaConfig(), Gemma3nTextConfig()], ids=lambda found: found.model_type
)
def test_every_family_of_configs_has_a_count(config: Any) -> None:
    small, large = (training_memory(config, r=r).per_token for r in (None, 8))
    assert config.num_hidden_layers * config.hidden_size * 8 < small < large


def test_a_row_of_1500_tokens_of_a_7b_fits_into_8_gb_with_checkpointing_and_not_without() -> None:
    qwen2 = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "r": 16, "dropout": 0.05}
    assert training_memory(qwen2, **settings, checkpointing=True).bytes(1500) < 2e9
    assert training_memory(qwen2, **settings).bytes(1500) > 8e9


def test_a_laptop_with_6_gb_trains_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    needs = training_memory(smollm2, r=16, dropout=0.05)
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 4 * 10**9)  # beside system and LM
    tokens = micro_batch_tokens(needs, CPU)
    assert 256 <= tokens <= 1024 and needs.bytes(tokens) <= 10**9
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 10**12)
    assert micro_batch_tokens(needs, CPU) == 1024


def test_max_memory_limits_what_is_free_beside_what_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 10**10)
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9))
    monkeypatch.setattr(module.psutil, "Process", lambda: used)
    assert free_memory(CPU) == free_memory(CPU, {0: 1}) == 10**10
    assert free_memory(CPU, {"cpu": 3 * 10**9}) == free_memory(CPU, {"cpu": "3GB"}) == 2 * 10**9
    assert free_memory(CPU, {"cpu": "20GiB"}) == 10**10
    assert free_memory(CPU, {"cpu": "0.5 GiB"}) == 0
    with pytest.raises(ValueError, match="max_memory: 'much' .* 20GiB"):
        free_memory(CPU, {"cpu": "much"})


def test_bytes_and_tokens_are_inverse_and_a_row_is_always_tried() -> None:
    needs = TrainingMemory(per_token=10, fixed=100)
    assert needs.bytes(5) == 150 and needs.tokens(150) == 5 and needs.tokens(159) == 5
    assert needs.tokens(0) == 1


def test_layers_are_checkpointed_above_a_billion_weights() -> None:
    assert [checkpoints("auto", size) for size in (10**9, 10**9 + 1)] == [False, True]
    assert checkpoints(True, 1) and not checkpoints(False, 10**12)
    with pytest.raises(ValueError, match="gradient_checkpointing: 'on'"):
        checkpoints("on", 1)
