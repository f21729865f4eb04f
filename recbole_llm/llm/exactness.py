"""Whether an LM is scored, trained and encoded exactly, checked once after loading and before anything is trained.

For speed, the scorers, the loss and the encoder use padding on the left, a cached beginning, or a tree of answers. These
optimisations are exact for causal attention to all earlier tokens, with positions that can be given. Windows, chunks, states and
position biases may break some of them. So each one that a run uses is compared with a reference: the LM on one row of token
ids, without padding, mask, positions or cache. If one disagrees, it is replaced by a slower one that agrees; if none agrees, the
LM is refused.

The prompts of the comparison are random tokens. The longer ones exceed every window that the config names, if the prompts of the
run can. In half precision, rounding can hide a difference. Therefore a tree and a shared beginning are not tried at all if a
window is within reach or a layer has a state.

Legend: T tokens, V vocabulary, D width of the LM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.encoding import encode
from recbole_llm.llm.forward import context_length, left_padded, lm_loss
from recbole_llm.llm.reading import Reading
from recbole_llm.llm.scoring import Scorer
from recbole_llm.store.processes import ProcessLostError

SHARED, SHORT, LONG, BEYOND = 8, 20, 40, 16  # tokens: of a common beginning, of prompts, of a prompt after the widest window
ANSWERS, ONE = (3, 1, 2), 1  # tokens of each prompt's answers, and the place of an answer of one token
WINDOWS = re.compile(r".*(window|chunk|block_size|index_topk|original_max_position).*")
NOT_WINDOWS = re.compile(r"chunk_size_feed_forward|.*(layer|pattern|block_size_|vision|audio).*")
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}  # layer types without a state
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # nats per answer token


class NotExactError(ValueError):
    """This package has no exact way of running the LM."""


@torch.no_grad()
def exact_reading(model: Any, *, scorer: str | None, longest: int, source: str, vectors: bool = False) -> Reading:
    """The fastest way of running ``model`` that is exact.

    Args:
        model: a causal LM in eval mode.
        scorer: the configured strategy of a ranker; None for an encoder, which reads hidden states.
        longest: tokens of the longest prompt and answer of the run.
        source: the LM's name, for messages.
        vectors: the prompts of a ranker have soft tokens, so that all their tokens are given as vectors, as an encoder's are.

    Raises:
        NotExactError: the LM cannot read token ids alone, is not causal, or disagrees with itself in every way.
    """
    about = f"llm_path: {source} (model_type {model.config.model_type})"
    try:
        probe = _Probe.of(model, longest, labels=scorer == "label", vectors=vectors or scorer is None)
    except NotExactError as error:
        raise NotExactError(f"{about}: {error}; choose a causal LM of text") from error
    found, reasons = Reading(context=context_length(model.config)), []
    if scorer and (problem := probe.problem_of_loss()):
        raise NotExactError(f"{about}: {problem}; choose another llm_path")
    for padding in (True, False):
        pad = 0 if padding else None
        problem = probe.problem_of_prompts(pad) if scorer else probe.problem_of_encoding(pad)
        if problem is None:
            found = replace(found, padding=padding)
            break
        reasons.append(f"of {'padded' if padding else 'unpadded'} rows {problem}")
    else:
        raise NotExactError(f"{about}: {'; '.join(reasons)}. No batches are exact; choose another llm_path")
    if not found.padding:
        found = _warned(found, f"{reasons[0]}: batches hold rows of equal length, which is slower")
    return _with_scorer(found, probe, scorer, about, _beyond_attention(model, longest)) if scorer else found


def _with_scorer(found: Reading, probe: _Probe, scorer: str, about: str, known: str | None) -> Reading:
    reasons = []
    for strategy in dict.fromkeys((scorer, *(("prefix",) if scorer == "tree" else ()), "naive")):
        for share in (True, False) if strategy != "naive" else (False,):
            if known and (strategy == "tree" or share):
                reasons.append(f"scorer: {strategy} is not exact with {known}")
                continue
            problem = probe.problem_of_scorer(Scorer(strategy, pad_token_id=0 if found.padding else None, share=share))
            if problem is None:
                found = replace(found, scorer=None if strategy == scorer else strategy, share=share)
                return found if strategy == scorer else _warned(found, f"{reasons[0]}; scorer: {strategy} takes its place")
            reasons.append(f"scorer: {strategy} {problem}")
    raise NotExactError(f"{about}: {'; '.join(dict.fromkeys(reasons))}. No scorer is exact; choose another llm_path")


def _beyond_attention(model: Any, longest: int) -> str | None:
    """What breaks a tree and a shared beginning: a window that a row of ``longest`` tokens exceeds, or a state."""
    config = model.config.get_text_config(decoder=True)
    kinds = {str(kind) for key in ("layer_types", "layers_block_type") for kind in getattr(config, key, None) or ()}
    if getattr(model, "_is_stateful", False) or kinds - ATTENTION:
        return f"layers of type {', '.join(sorted(kinds - ATTENTION)) or 'state space'}"
    windows = sorted({window for window in _windows(config.to_dict()) if window < longest})
    return f"a window of {windows[0]} tokens (the run reads up to {longest})" if windows else None


def reads_ids(text: Any) -> bool:
    """Whether layers of an LM of this configuration look up vectors by the ids of tokens, as those of Gemma 3n and 4."""
    return bool(getattr(text, "hidden_size_per_layer_input", None))


def check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    """Raise a NotExactError if the tokenizer has ids that the LM cannot embed."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise NotExactError(
            f"llm_path: the tokenizer of {source} has {len(tokenizer)} tokens, but the LM embeds {rows}; call "
            "resize_token_embeddings() and save the model again, or use the LM's own tokenizer"
        )


def _warned(found: Reading, warning: str) -> Reading:
    return replace(found, warnings=(*found.warnings, warning))


def probe_lengths(config: Any, longest: int) -> tuple[int, int]:
    """Tokens of the short and the long prompt: beyond every window of the config, within the run and the LM's context."""
    windows = [window for window in _windows(config.to_dict()) if window < longest]
    room = min(longest, context_length(config) or longest) - max(ANSWERS)
    long = max(2, min(room, max(LONG, *(window + BEYOND for window in windows), 0)))
    return max(1, min(SHORT, long // 2)), long


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _windows({str(inner): found for inner, found in value.items()})
        elif isinstance(value, int) and value > 1 and WINDOWS.fullmatch(key) and not NOT_WINDOWS.fullmatch(key):
            yield value


@dataclass(frozen=True)
class _Probe:
    """A model with a few prompts and answers, and their scores by the reference.

    Attributes:
        prompts: three long ones, one of them shorter by a token so that a batch of these is padded, and a short one; they have
            a common beginning.
        answers: of each prompt.
        soft: a vector [1, D] that no prompt has, with which all tokens are given as vectors; None gives their ids.
        scores: log P of each answer, [prompts, answers].
    """

    model: Any
    prompts: list[list[int]]
    answers: list[list[list[int]]]
    soft: Tensor | None
    scores: Tensor

    @classmethod
    def of(cls, model: Any, longest: int, labels: bool, vectors: bool) -> _Probe:
        weight, text = model.get_input_embeddings().weight, model.config.get_text_config(decoder=True)
        if vectors and reads_ids(text):  # transformers would compare each vector with the whole vocabulary to find its id
            raise NotExactError("its layers look up the ids of tokens, so it takes no soft tokens")
        vocabulary = min(weight.shape[0], text.vocab_size)
        draw = torch.Generator().manual_seed(0)

        def tokens(number: int) -> list[int]:
            return torch.randint(vocabulary, (number,), generator=draw).tolist()

        short, long = probe_lengths(model.config, longest)
        start = tokens(min(SHARED, short - 1))
        prompts = [start + tokens(length - len(start)) for length in (long, short, long - 1, long)]
        answers = [[tokens(1 if labels else length) for length in ANSWERS] for _ in prompts]
        try:
            read = [[_logits(model, prompt + answer) for answer in some] for prompt, some in zip(prompts, answers, strict=True)]
            alone = [_logits(model, prompt) for prompt in prompts]  # [T, V]
            scores = [
                [_sum(row, prompt, answer) for row, answer in zip(some, given, strict=True)]
                for some, prompt, given in zip(read, prompts, answers, strict=True)
            ]
        except ProcessLostError:
            raise
        except Exception as error:  # whatever the model's own code raises: it is not ours to sort
            raise NotExactError(f"it does not run on token ids alone ({_line(error)})") from error
        for prompt, logits, some in zip(prompts, alone, read, strict=True):
            later = max(_size(row[: len(prompt)] - logits, model) / float(logits.std()) for row in some)
            if not later <= _tolerance(model):
                raise NotExactError(f"it is not causal: a later token changes earlier logits by {later:.2g} standard deviations")
        soft = weight.new_zeros(1, weight.shape[1]) if vectors else None
        return cls(model, prompts, answers, soft, torch.tensor(scores))

    def problem_of_scorer(self, scorer: Scorer) -> str | None:
        """What is wrong with the scores, or None."""
        lengths = torch.tensor([[len(answer) for answer in row] for row in self.answers])
        prompts = [Prompt(ids) for ids in self.prompts]

        def difference() -> Tensor:
            return (scorer(self.model, prompts, self.answers, self.soft).cpu() - self.scores) / lengths

        return self._problem(difference, "nats per token")

    def problem_of_loss(self) -> str | None:
        """What is wrong with the training loss of rows in one batch, padded on the right, or None."""
        answers = [row[0] for row in self.answers]
        examples = [Example.of(Prompt(prompt), answer) for prompt, answer in zip(self.prompts, answers, strict=True)]
        expected = -self.scores[:, 0].sum() / sum(map(len, answers))
        found = self._problem(lambda: lm_loss(self.model, examples, soft=self.soft).cpu() - expected, "nats per token")
        return found and f"the loss {found}"

    def problem_of_prompts(self, pad: int | None) -> str | None:
        """What is wrong with the next token after prompts that are padded on the left, or alone for None; or None."""
        rows = [Prompt(ids) for ids in self.prompts]
        places = torch.arange(len(rows)), torch.tensor([row[ONE][0] for row in self.answers])

        def difference() -> Tensor:
            groups = [[row] for row in rows] if pad is None else [rows]
            inputs = [left_padded(self.model, group, pad or 0, self.soft)[0] for group in groups]
            logits = [self.model(**given, logits_to_keep=1).logits[:, -1].float().cpu() for given in inputs]
            return torch.cat(logits).log_softmax(-1)[places] - self.scores[:, ONE]

        found = self._problem(difference, "nats")
        return found and f"the next token {found}"

    def problem_of_encoding(self, pad: int | None) -> str | None:
        """What is wrong with the last hidden states and with their means, or None."""
        rows = [Prompt(ids) for ids in self.prompts]

        def difference() -> Tensor:
            last, mean = (encode(self.model, rows, pad, soft=self.soft, mean=mean).cpu() for mean in (False, True))
            states = [_states(self.model, prompt) for prompt in self.prompts]  # [T, D]
            expected = torch.stack([state[-1] for state in states]), torch.stack([state.mean(0) for state in states])
            return torch.cat([(last - expected[0]) / expected[0].std(), (mean - expected[1]) / expected[1].std()])

        found = self._problem(difference, "standard deviations")
        return found and f"the encoding {found}"

    def _problem(self, difference: Callable[[], Tensor], unit: str) -> str | None:
        try:
            found = difference()
        except ProcessLostError:
            raise
        except Exception as error:
            return f"fails ({_line(error)})"
        size = _size(found, self.model)
        return None if size <= _tolerance(self.model) else f"is off by {size:.2g} {unit}"


def _logits(model: Any, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([row], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids).logits[0].float().cpu()  # [T, V]


def _states(model: Any, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([row], device=model.get_input_embeddings().weight.device)
    return model.base_model(input_ids=ids).last_hidden_state[0].float().cpu()  # [T, D]


def _sum(logits: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> float:
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(logits.log_softmax(-1)[places, torch.tensor(answer)].sum())


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def _size(difference: Tensor, model: Any) -> float:
    """The largest difference; in half precision the mean, since single values are rounded further apart."""
    return float(difference.abs().max() if _tolerance(model) < 0.01 else difference.abs().mean())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
