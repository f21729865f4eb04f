"""Tiny, randomly initialised models of the families that people use, and a byte-level tokenizer."""

from collections.abc import Callable
from string import ascii_lowercase, digits
from typing import Any

import pytest
import torch

VOCABULARY = 60
FAMILIES = ("llama", "llama-gqa", "qwen2-gqa", "opt", "gpt2")


def tiny_model(family: str, attention: str = "sdpa") -> Any:
    """Two layers, 16 to 32 wide. Embeddings are tied except in 'llama'; 'gqa' shares key-value heads; opt and gpt2 have
    learned positions. Weights are large, so that scores differ."""
    import transformers as hf

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": attention,
        "initializer_range": 0.2,
    }
    rotary = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    config = {
        "llama": lambda: hf.LlamaConfig(**common, **rotary, tie_word_embeddings=False),
        "llama-gqa": lambda: hf.LlamaConfig(**common, **rotary, num_key_value_heads=2, tie_word_embeddings=True),
        "qwen2-gqa": lambda: hf.Qwen2Config(**common, **rotary, num_key_value_heads=1, tie_word_embeddings=True),
        "opt": lambda: hf.OPTConfig(
            **{**common, "init_std": 0.2},
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        "gpt2": lambda: hf.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    }[family]()
    return hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tiny_tokenizer(**special: str) -> Any:
    """Byte-level BPE over letters, digits and the space (Ġ), without merges: what each family's own class can read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "Ġ", *ascii_lowercase, *digits]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Any]:
    return tiny_tokenizer
