"""The shape of a causal LM, from its configuration alone: weights, floating-point operations and bytes of a token.

The count of operations is that of Kaplan et al. ("Scaling Laws for Neural Language Models", arXiv 2001.08361, section 2.1): two
for each weight and token, and those of attention. Training a LoRA adds the same number once for the gradient of the frozen
layers' inputs, but not for that of their weights; training all weights adds twice as many.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.llm.causal_lm import blank_model
from recbole_llm.llm.lora_targets import beyond_text
from recbole_llm.llm.memory import by_layer
from recbole_llm.store.costs import Tokens


@dataclass(frozen=True)
class LMShape:
    """Sizes of a causal LM.

    Attributes:
        parameters: all weights, tied ones once.
        matrices: weights that multiply every token: without embeddings, ``lm_head``, experts that are not chosen, and the part
            that reads images.
        head: weights of ``lm_head``, tied or not.
        attention: width of the queries of all heads, times the number of layers.
        cached: numbers in the keys and values of one token.
        width, vocabulary: D and V.
        bytes: of a weight in computation.
        weight_bytes: of all weights that a process has in memory.
    """

    parameters: int
    matrices: int
    head: int
    attention: int
    cached: int
    width: int
    vocabulary: int
    inner: int
    bytes: int
    weight_bytes: int

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, *, load_in_4bit: bool = False, shards: int = 1) -> LMShape:
        """The shape of the LM that ``config``, of ``transformers``, describes, spread over ``shards`` processes."""
        model, text = blank_model(config), config.get_text_config()
        head = model.get_output_embeddings()
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        apart = embeddings | ({id(head.weight)} if head is not None else set())
        chosen = _share_of_experts(text)
        # the experts of a layer are one tensor of three dimensions
        images = re.compile(beyond_text(model) or r"(?!)")
        weights = [p for name, p in model.named_parameters() if p.dim() > 1 and not images.fullmatch(name)]
        sizes = {id(p): round(p.numel() * (chosen if p.dim() == 3 else 1)) for p in weights}
        parameters = sum(p.numel() for p in model.parameters())
        linear = sum(size for key, size in sizes.items() if key not in apart)
        stored = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in apart)  # with all experts
        layers, heads = text.num_hidden_layers, by_layer(text, "num_attention_heads", default=1)
        dims = by_layer(text, "head_dim", default=text.hidden_size // max(heads))
        shared = by_layer(text, "num_key_value_heads", default=max(heads))
        width = dtype.itemsize
        # NF4 with double quantization: half a byte and 0.127 bits for the scales (QLoRA, arXiv 2305.14314, section 3)
        quantised = round(stored * (4.127 / 8)) + (parameters - stored) * width
        # a process holds its share of the layers, one of them whole, and a second one while it gathers that for another process
        held = parameters if shards == 1 else parameters - stored + stored // shards + min(2, layers) * (stored // layers)
        return cls(
            parameters=parameters,
            matrices=linear,
            head=text.vocab_size * text.hidden_size,
            attention=sum(a * b for a, b in zip(heads, dims, strict=True)),
            cached=2 * sum(a * b for a, b in zip(shared, dims, strict=True)),
            width=text.hidden_size,
            vocabulary=text.vocab_size,
            inner=max(by_layer(text, "intermediate_size", "ffn_dim", default=4 * text.hidden_size)),
            bytes=width,
            weight_bytes=quantised if load_in_4bit else held * width,
        )

    def flops(self, tokens: Tokens) -> float:
        """Floating-point operations of forward passes, padding included."""
        return 2.0 * self.matrices * tokens.fed + 4.0 * self.attention * tokens.pairs + 2.0 * self.head * tokens.logits

    def forward_bytes(self, tokens: Tokens) -> dict[str, int]:
        """Peak bytes of the largest forward pass without gradients, by part: those of one layer at a time."""
        hidden = tokens.most_fed * (4 * self.width + 3 * self.inner) * self.bytes
        logits, cached = tokens.most_logits * self.vocabulary * self.bytes, tokens.most_cached * self.cached * self.bytes
        return {"hidden states": hidden, "logits": logits, "KV cache": cached}


def _share_of_experts(text: Any) -> float:
    """The share of a mixture's experts that one token uses; 1 without experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    return getattr(text, "num_experts_per_tok", total) / total if total else 1.0
