"""Greedy decoding of answers, as in the papers that rank by generated titles; this package's own ranking does not use it.

Legend: B prompts, N new tokens, S soft tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.counting import tokens_of
from recbole_llm.llm.exactness import reads_ids
from recbole_llm.llm.forward import context_length, left_padded
from recbole_llm.llm.lora import AdapterView
from recbole_llm.llm.packing import token_batches
from recbole_llm.store.costs import Tokens


def check_generates(config: Any) -> None:
    """Check that an LM of this ``transformers`` configuration generates from vectors, as :class:`Generator` does.

    Raises:
        ValueError: its class in ``transformers`` cannot.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    vectors = "inputs_embeds" in inspect.signature(kind.prepare_inputs_for_generation).parameters
    if not vectors or reads_ids(config.get_text_config(decoder=True)):
        raise ValueError(
            f"scoring: published generates answers from vectors, which {kind.__name__} of transformers cannot; give scoring: "
            "likelihood, or another llm_path"
        )


@dataclass(frozen=True)
class Generator:
    """Decodes answers greedily: ``generator(lm, prompts) -> B texts``, in the order given.

    Decoding is that of ``transformers``, left padded and with a KV cache. The generation settings in the LM's folder (sampling, a
    penalty of its own) are not used, except its end tokens. The penalty concerns new tokens alone, not those of the prompt.

    Args:
        tokenizer: decodes the answers, without special tokens.
        max_new_tokens: maximum number of tokens of an answer; fewer if the LM's context ends before.
        repetition_penalty: above 1, logits of tokens that the answer has already are lowered.
        batch_tokens: maximum number of padded prompt tokens in a batch; a single prompt may exceed it.
        padding: False never pads a prompt: those of equal lengths share a batch.
    """

    tokenizer: Any
    max_new_tokens: int
    repetition_penalty: float = 1.0
    batch_tokens: int = 8192
    padding: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    @property
    def settings(self) -> dict[str, Any]:
        """What determines answers besides the LM and its prompts."""
        return {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}

    def decode(self, tokens: Sequence[int]) -> str:
        """A text without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def __call__(
        self,
        lm: Any,
        prompts: Sequence[Prompt],
        soft: Tensor | None = None,
        complete: Callable[[str], bool] | None = None,
    ) -> list[str]:
        """The answers to B prompts.

        Args:
            lm: a causal LM of ``transformers``, or an :class:`~recbole_llm.llm.lora.AdapterView` of one.
            soft: vectors [S, D] of the prompts' soft slots.
            complete: whether an answer, read so far, needs no further token; it otherwise ends with an end token.

        Raises:
            ValueError: a prompt leaves no room for an answer in the LM's context.
        """
        model = lm.selected() if isinstance(lm, AdapterView) else lm
        answers = [""] * len(prompts)
        ends = self.end_tokens(model)
        with _no_generation_settings(model):
            for batch in self._batches(prompts):
                found = self._generate(model, [prompts[i] for i in batch], soft, complete, ends)
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
        return answers

    def end_tokens(self, lm: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those of the generation settings in the LM's folder."""
        model: Any = lm.model.get_base_model() if isinstance(lm, AdapterView) else lm
        settings = model.generation_config
        own = settings and settings.eos_token_id  # one, several or none; an LM that cannot generate has no settings
        listed = own if isinstance(own, list) else [own]
        return sorted({int(self.tokenizer.eos_token_id), *(int(token) for token in listed if token is not None)})

    def most_tokens(self, model: Any, prompts: Sequence[Prompt]) -> Tokens:
        """The tokens of a call if no answer ends before its last token."""
        found = Tokens()
        for batch in self._batches(prompts):
            some = [prompts[i] for i in batch]
            rows, width, new = len(some), max(map(len, some)), self._room(model, some)
            found += replace(tokens_of(rows, width, 0, None, rows, rows * width), real=sum(map(len, some)))
            for past in range(width, width + new - 1):  # the last token is not read
                found += tokens_of(rows, 1, past, None, rows, rows * (past + 1))
        return found

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        share = 1.0 if self.padding else 0.0
        return token_batches([*map(len, prompts)], [0] * len(prompts), self.batch_tokens, padding=share)

    def _generate(
        self, model: Any, prompts: Sequence[Prompt], soft: Tensor | None, complete: Callable[[str], bool] | None, ends: list[int]
    ) -> list[str]:
        from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

        # not the penalty of GenerationConfig: with vectors as input, it spares as many new tokens as a row has padding
        penalty = float(self.repetition_penalty)
        pad = int(self.tokenizer.pad_token_id)
        inputs, tokens, _ = left_padded(model, prompts, pad, soft)
        found = model.generate(  # of the answers alone, since the prompts are vectors
            inputs_embeds=inputs.get("inputs_embeds", model.get_input_embeddings()(tokens)),
            attention_mask=inputs["attention_mask"],
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._room(model, prompts),
                eos_token_id=ends,
                pad_token_id=pad,
            ),
            logits_processor=[RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [],
            stopping_criteria=[_Complete(self.decode, complete)] if complete else [],
        ).tolist()  # [B, N]
        rows = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in found]
        return [self.decode(row) for row in rows]

    def _room(self, model: Any, prompts: Sequence[Prompt]) -> int:
        """New tokens that fit behind the longest prompt."""
        longest = max(map(len, prompts))
        context = context_length(model.config) or longest + self.max_new_tokens
        if longest >= context:
            raise ValueError(
                f"a prompt has {longest} tokens and leaves no room for an answer in the model's context of {context}; "
                "lower max_prompt_tokens or max_history"
            )
        return min(self.max_new_tokens, context - longest)


@dataclass(frozen=True)
class _Complete:
    """A stopping criterion of ``transformers``: tokens [B, N] and scores -> BoolTensor[B]."""

    decode: Callable[[list[int]], str]
    complete: Callable[[str], bool]

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([self.complete(self.decode(row)) for row in tokens.tolist()], device=tokens.device)


@contextmanager
def _no_generation_settings(model: Any) -> Iterator[None]:
    """Without the generation settings of the model's folder, which ``generate`` merges into those that it is given."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
