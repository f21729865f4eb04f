"""A causal LM of a given shape that computes nothing. The tokens that it is given are counted like those of any other LM.

Training and scoring make their batches, prompts, trees and caches by their own code, so the counts are those of a real run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.costs.blank import Blank
from recbole_llm.llm.counting import count_passes


class BlankLM(nn.Module):
    """The interface of a causal LM of ``transformers`` that this package uses.

    Args:
        config: the LM's.
        dtype: of its weights.
    """

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32):
        super().__init__()
        text = config.get_text_config()
        self.config, self.dtype, self.device = copy.deepcopy(config), dtype, torch.device("cpu")
        self.config._attn_implementation = "sdpa"  # it takes any mask
        self.head = _Head(Blank.of((text.vocab_size, text.hidden_size), dtype))
        self.base_model = _Body(self.head.weight)
        count_passes(self)
        self.eval()

    def get_input_embeddings(self) -> Any:
        """The embeddings of tokens."""
        return self.base_model.embeddings

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.head

    def forward(self, *, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Any:
        """Logits [B, T, V], or those of the positions ``logits_to_keep``, with the cache."""
        found = self.base_model(**inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(found.last_hidden_state[:, kept])
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)


class _Body(nn.Module):
    """The LM without its head: hidden states [B, T, D], with the cache."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.embeddings = _Embeddings(weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> Any:
        hidden = self.embeddings(input_ids) if inputs_embeds is None else Blank.of(inputs_embeds.shape, inputs_embeds.dtype)
        cache = _grown(past_key_values, hidden) if use_cache else None
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


class _Weighted(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight


class _Embeddings(_Weighted):
    """Tokens of any shape -> blank embeddings [..., D]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return Blank.of((*tokens.shape, self.weight.shape[1]), self.weight.dtype)


class _Head(_Weighted):
    """Hidden states [..., D] -> blank logits [..., V]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return Blank.of((*hidden.shape[:-1], len(self.weight)), self.weight.dtype)


def _grown(cache: Any, hidden: Tensor) -> Any:
    """A cache, with blank keys and values in its only layer."""
    from transformers import DynamicCache

    cache = cache if cache is not None else DynamicCache()
    blank = Blank.of((hidden.shape[0], 1, hidden.shape[1], 1), hidden.dtype)
    cache.update(blank, blank, 0)
    return cache
