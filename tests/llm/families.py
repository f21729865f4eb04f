"""Every causal LM family of the installed ``transformers``, in tiny: random weights on a config shrunk by one recipe.

:data:`SIZES` says what a key of a config becomes, by its name; :data:`OWN` has the few families that need more;
:data:`NOT_BUILT` those that cannot be built this way, with the reason.
"""

from __future__ import annotations

import re
from typing import Any

import torch

VOCABULARY, CONTEXT, WINDOW, LAYERS = 64, 96, 8, 4

SIZES: list[tuple[str, int]] = [  # the first pattern that matches a key decides
    (r".*pad_token_id|padding_idx|pad_index", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r".*_token_id|.*_token_index|.*_token", 3),
    (r".*vocab_size|n_words|num_embeddings|vocab_size_per_layer_input|.*group_vocab|ngram_vocab_size_base", VOCABULARY),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r".*(num|n)_(kv|key_value)_heads|num_(kv|key_value)_heads|num_attention_groups|num_query_groups|kv_n_heads", 2),
    (r"(.*num_|.*n_)(.*_)?heads?|n_head|.*attention_heads", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|context_length", CONTEXT),
    (r"sliding_window|sliding_window_size|window_size|attention_window_size|attention_chunk_size|block_size", WINDOW),
    (r"(mamba_)?chunk_size", WINDOW),
    (r"(num_hidden_layers|n_layers?|num_layers|.*encoder_layers|.*decoder_layers|num_blocks)", LAYERS),
    (r"hidden_size|d_model|n_embd|.*dim_model|emb_dim|embed_dim|hidden_dim|word_embed_proj_dim|embedding_size|lru_width", 32),
    (r".*(intermediate_size|ffn_dim|n_inner|ffn_hidden_size|feed_forward_size|dim_ff|d_ff|d_inner)", 48),
    (r"rotary_dim", 4),
    (r".*qk_rope_head_dim", 8),
    (r".*(head_dim|kv_channels)|d_kv|d_head|attention_head_size", 8),
    (r"num_.*experts|n_.*experts|.*num_experts", 4),
    (r".*experts_per_tok(en)?|.*moe_topk|.*moe_top_k|top_k|moe_k|num_experts_per_token|topk", 2),
    (r"(q|kv|o)_lora_rank", 16),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"index_topk", WINDOW),
]
LARGE = ("initializer_range", "init_std", "init_method_std")  # so that what a token sees shows in the result

MIXED = ["linear_attention", "full_attention"] * (LAYERS // 2)
PER_LAYER = {"per_layer_config": {str(layer): {"head_dim": 8} for layer in range(LAYERS)}}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "beam": {"num_attention_heads": 4, "head_dim": 8, "rel_pos_dim": 8},
    "blenderbot": {"is_encoder_decoder": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"prompt_types": 4, "prompt_length": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": PER_LAYER,
    "gemma4_unified_text": PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": MIXED, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {"num_layers": 2, "qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
NOT_BUILT = {
    "dbrx": "the class of its attention's config lacks a key that its model reads",
    "dots3_note": "sizes by layer, which cannot be read from the config as a whole",
    "dots3_note_text": "sizes by layer",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "reads the cache of another model",
    "gemma4_unified_assistant": "reads the cache of another model",
    "musicgen": "generates audio from an encoder, a decoder and a text model",
    "musicgen_melody": "generates audio from an encoder, a decoder and a text model",
    "qwen4_exp": "its default config lacks the sizes of its indexer",
    "qwen4_exp_text": "its default config lacks the sizes of its indexer",
}


def shrunk(cls: type, changes: dict[str, Any]) -> Any:
    """A config of small sizes; what it derives from its sizes, it derives from the small ones."""
    default = cls()
    small: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        if key in default.sub_configs and value is not None:
            small[key] = shrunk(type(getattr(default, key)), OWN.get(value.get("model_type"), {})).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)
            if size is not None and value > size:
                small[key] = size
        elif key == "eos_token_id" and isinstance(value, list):
            small[key] = 2
        elif key in LARGE:
            small[key] = 0.2
    for keys, values in (("num_key_value_heads", "num_attention_heads"),):  # as many as in the family itself
        plain = default.to_dict()
        if keys in plain and plain[keys] == plain.get(values):
            small[keys] = small.get(values, plain[values])
    return cls(**small | changes)


def build(family: str, **changes: Any) -> Any:
    """A tiny model of a family; ``changes`` are keys of its config."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = shrunk(CONFIG_MAPPING[family], OWN.get(family, {}) | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
