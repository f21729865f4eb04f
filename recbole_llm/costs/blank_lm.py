"""A causal LM of a given shape that computes nothing and counts the tokens that it is given.

The batches, prompts, trees and caches of training and scoring are made by their own code, so the counts are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.costs.blank import Blank
from recbole_llm.llm.counting import tokens_of
from recbole_llm.store.costs import count


@dataclass(frozen=True)
class _Head:
    """``lm_head``."""

    weight: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return Blank.of((*hidden.shape[:-1], len(self.weight)), hidden.dtype)


class BlankLM:
    """The interface of a causal LM of ``transformers`` that this package uses.

    Args:
        config: the LM's.
        dtype: of its weights.
    """

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32):
        self.config, self.dtype, self.training = config, dtype, False
        text = config.get_text_config()
        self._vocabulary, self._width, self._layers = text.vocab_size, text.hidden_size, text.num_hidden_layers
        self._input = Embeddings(Blank.of((self._vocabulary, self._width), dtype))
        self._head = _Head(self._input.weight)
        self.device = self._input.weight.device

    @property
    def base_model(self) -> Any:
        """The LM without its head."""
        return self.hidden

    def get_input_embeddings(self) -> Embeddings:
        """The embeddings of tokens."""
        return self._input

    def get_output_embeddings(self) -> _Head:
        """The head."""
        return self._head

    def train(self, mode: bool = True) -> BlankLM:
        """Set the mode, which changes nothing."""
        self.training = mode
        return self

    def eval(self) -> BlankLM:
        """Set the mode, which changes nothing."""
        return self.train(False)

    def __call__(self, *, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Any:
        """Logits [B, T, V], or those of the last ``logits_to_keep`` positions, with the cache."""
        rows, length = _shape(inputs)
        kept = logits_to_keep.numel() if isinstance(logits_to_keep, Tensor) else logits_to_keep or length
        found = self.hidden(**inputs, logits=rows * min(kept, length))
        logits = Blank.of((rows, min(kept, length), self._vocabulary), self.dtype)
        return SimpleNamespace(logits=logits, past_key_values=found.past_key_values)

    def hidden(self, *, logits: int = 0, use_cache: bool = True, past_key_values: Any = None, **inputs: Any) -> Any:
        """Hidden states [B, T, D], with the cache; counts the tokens."""
        rows, length = _shape(inputs)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        cache = self._grown(past_key_values, rows, length) if use_cache else past_key_values
        cached = rows * cache.get_seq_length() if cache is not None else 0
        count(tokens_of(rows, length, past, inputs.get("attention_mask"), logits, cached), trained=torch.is_grad_enabled())
        return SimpleNamespace(last_hidden_state=Blank.of((rows, length, self._width), self.dtype), past_key_values=cache)

    def _grown(self, cache: Any, rows: int, length: int) -> Any:
        """A cache, with keys and values of one number each in its only layer."""
        from transformers import DynamicCache

        cache = cache if cache is not None else DynamicCache()
        blank = Blank.of((rows, 1, length, 1), self.dtype)
        cache.update(blank, blank, 0)
        return cache


class Embeddings(nn.Module):
    """Blank embeddings [V, D]: tokens of any shape -> [..., D]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return Blank.of((*tokens.shape, self.weight.shape[1]), self.weight.dtype)


def _shape(inputs: Any) -> tuple[int, int]:
    ids, vectors = inputs.get("input_ids"), inputs.get("inputs_embeds")
    return tuple((ids if vectors is None else vectors).shape[:2])  # type: ignore[return-value]
