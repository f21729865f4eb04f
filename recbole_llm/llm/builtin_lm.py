"""The builtin LM: a small Llama trained on the catalogue, so that the first command needs no download.

Its tokenizer is a byte-level BPE of the catalogue's titles. Its training data are the histories of the training split, in
the format of prompts, ``<s>title\\ntitle\\n...``. Every token is a target. It learns which titles follow which and has no
other knowledge, so tables name it ``builtin``. It is saved as an ordinary ``transformers`` folder.

Three choices keep the training within minutes on a CPU. Words may merge into whole titles, frequent ones first, which
reduces a history to a third of the tokens. Muon trains the matrices (``training/muon.py``). Batches are small: at this size,
more steps improve the model more than less noisy gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_llm.data.domains import Domain, united
from recbole_llm.data.tokens import tokenise_as_text
from recbole_llm.llm.counting import count_passes
from recbole_llm.llm.windows import Histories, WindowBatches
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.processes import current
from recbole_llm.store.stages import Stage, Work
from recbole_llm.training.loop import DEFAULT_OPTIONS, LoopOptions, Part, TrainingLoop, weighted
from recbole_llm.training.muon import MuonAdamW
from recbole_llm.training.schedule import Schedule

logger = getLogger()

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SEPARATOR = "\n"


@dataclass(frozen=True)
class BuiltinLMConfig:
    """Size and training of the builtin LM.

    Attributes:
        vocab_size: maximum number of tokens, including 256 bytes and 3 special tokens.
        hidden_size, num_layers, num_heads: of the Llama; the feed-forward layers are 8/3 as wide.
        window: titles in a training row.
        max_title_tokens: longer titles are truncated, as in prompts.
        tokens: training budget in predicted tokens.
        epochs: maximum number of passes over the histories.
        batch_tokens: tokens of an optimiser step, padding included.
        learning_rate: of embeddings and norms (AdamW).
        matrix_learning_rate, weight_decay: of all other weights (Muon).
        warmup_ratio: share of the steps with linear warm-up; a cosine follows.
        dtype: ``float32``, or ``bfloat16`` for autocast with weights in float32.
    """

    vocab_size: int = 6000
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    window: int = 20
    max_title_tokens: int = 32
    tokens: int = 420_000
    epochs: int = 20
    batch_tokens: int = 768
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.015
    weight_decay: float = 0.1
    warmup_ratio: float = 0.05
    dtype: str = "float32"

    def __post_init__(self) -> None:
        counts = "hidden_size num_layers num_heads window max_title_tokens tokens epochs batch_tokens"
        for key in counts.split():
            if getattr(self, key) < 1:
                raise ValueError(f"builtin_lm.{key}: {getattr(self, key)} must be at least 1")
        if self.vocab_size < 259:
            raise ValueError(f"builtin_lm.vocab_size: {self.vocab_size} has no room for 256 bytes and 3 special tokens")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"builtin_lm.hidden_size: {self.hidden_size} is not a multiple of 2 * num_heads, {2 * self.num_heads}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"builtin_lm.dtype: {self.dtype!r} is neither float32 nor bfloat16")

    @classmethod
    def read(cls, settings: dict[str, Any]) -> BuiltinLMConfig:
        """The settings of a property file. Raises ValueError for an unknown key, with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                near = get_close_matches(key, known, 1) or known
                raise ValueError(f"builtin_lm.{key} is unknown; there is {', '.join(near)}")
        return cls(**settings)


def builtin_stage(
    settings: dict[str, Any], domains: Sequence[Domain], seed: int, options: LoopOptions = DEFAULT_OPTIONS
) -> Stage:
    """The training of the builtin LM on the domains' training splits, as a cached and resumable stage."""
    config = BuiltinLMConfig.read(settings)

    def build(work: Work) -> None:
        train_builtin_lm(work.out, *united(domains), config=config, seed=seed, scratch=work.scratch, options=options)

    depends = {"config": asdict(config), "domains": [domain.fingerprint for domain in domains], "seed": seed}
    return Stage("builtin-lm", depends, build)


def untrained(settings: dict[str, Any], domains: Sequence[Domain]) -> tuple[Any, Any]:
    """Configuration and tokenizer of the builtin LM of the domains, without training it."""
    config, (titles, histories) = BuiltinLMConfig.read(settings), united(domains)
    tokenizer = _tokenizer(titles, histories, config)
    return llama_config(config, len(tokenizer)), tokenizer


def train_builtin_lm(
    folder: Path,
    titles: Sequence[str],
    histories: Histories,
    *,
    config: BuiltinLMConfig,
    seed: int = 2020,
    scratch: Path | None = None,
    options: LoopOptions = DEFAULT_OPTIONS,
) -> None:
    """Train the builtin LM and write it to ``folder`` as config.json, model.safetensors and the tokenizer's files.

    The result is independent of the global random state. On one CPU it is bit-equal, also after a kill and a resume.

    Args:
        titles: title by item id, as prompts show it; empty for the padding item.
        histories: item ids of each user in time order, of the training split only.
        scratch: folder of checkpoints, from which a later call resumes; None writes none.

    Raises:
        ValueError: no titles, no history, or an item id without a title.
    """
    _check(titles, histories)
    tokenizer = _tokenizer(titles, histories, config)
    batches = training_batches(tokenizer, titles, histories, config, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(config, len(tokenizer))
    count_passes(model)
    logger.info(f"builtin LM: {model.num_parameters():,} parameters, {len(tokenizer)} tokens; {len(batches)} steps")
    optimizer = new_optimizer(model, config)
    TrainingLoop(
        name="builtin-lm",
        parameters=dict(model.named_parameters()),
        optimizer=optimizer,
        scheduler=Schedule(warmup_ratio=config.warmup_ratio).build(optimizer, len(batches)),
        loss=lambda step: step_parts(model, batches[step], config.dtype),
        total_steps=len(batches),
        folder=scratch / "loop" if scratch else None,
        options=options,
        learning_rate_key="builtin_lm.matrix_learning_rate",
    ).run()
    hide_progress_bars()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(titles: Sequence[str], histories: Histories, config: BuiltinLMConfig) -> Any:
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
    return train_tokenizer(titles, np.bincount(items, minlength=len(titles)).tolist(), config.vocab_size)


def training_batches(
    tokenizer: Any, titles: Sequence[str], histories: Histories, config: BuiltinLMConfig, seed: int
) -> WindowBatches:
    """The batches of all steps."""
    end = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    answers = [row[: config.max_title_tokens] + end for row in tokenise_as_text(tokenizer, titles)]
    return WindowBatches(
        answers,
        histories,
        begin=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        window=config.window,
        batch_tokens=config.batch_tokens,
        tokens=config.tokens,
        epochs=config.epochs,
        seed=seed,
    )


def _check(titles: Sequence[str], histories: Histories) -> None:
    if not any(titles):
        raise ValueError("titles: no item has one, so the builtin LM has no training data")
    if not any(len(history) for history in histories):
        raise ValueError("histories: the training split is empty, so the builtin LM has no training data")
    for user, history in enumerate(histories):
        if len(history) and not 0 <= min(history) <= max(history) < len(titles):
            raise ValueError(f"histories: item {max(history, key=abs)} of history {user} has no title, there are {len(titles)}")


def train_tokenizer(titles: Sequence[str], counts: Sequence[int], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer in which whole titles may become one token, those with the largest counts first.

    Any Unicode text survives encoding and decoding. Special tokens such as ``<s>`` in a text are encoded as ordinary text.
    A title has the square root of its count as its weight, so that rare titles are represented too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    weighted = ([title] * max(1, math.isqrt(count)) for title, count in zip(titles, counts, strict=True))
    tokenizer.train_from_iterator(chain.from_iterable(weighted), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def new_model(config: BuiltinLMConfig, vocab_size: int) -> Any:
    """An untrained Llama of the configured size."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(config, vocab_size)).train()


def llama_config(config: BuiltinLMConfig, vocab_size: int) -> Any:
    """A Llama of the configured size, with one matrix for embeddings and output."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=max(32, config.hidden_size * 8 // 3 // 32 * 32),
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def new_optimizer(model: Any, config: BuiltinLMConfig) -> MuonAdamW:
    """Muon for the matrices between hidden states, AdamW for norms and for the embeddings, which are tied to the output."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and "embed_tokens" not in name}
    return MuonAdamW(
        matrices.values(),
        [p for name, p in named.items() if name not in matrices],
        matrix_lr=config.matrix_learning_rate,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def step_parts(model: Any, rows: Tensor, dtype: str) -> list[Part]:
    """The loss of a step over rows [B, T], as :func:`lm_loss`, some of which each process of the run has."""
    number = min(current().size, len(rows))
    shares = [rows[first::number] for first in range(number)]
    counts = [int((share[:, 1:] != model.config.pad_token_id).sum()) for share in shares]
    return [
        weighted(count / sum(counts), lm_loss, model, share, dtype) for share, count in zip(shares, counts, strict=True) if count
    ]


def lm_loss(model: Any, rows: Tensor, dtype: str) -> Tensor:
    """Mean negative log-likelihood of all tokens of ``rows`` [B, T] but the first of each row and padding."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.base_model(input_ids=rows[:, :-1]).last_hidden_state  # [B, T - 1, D]
        targets = rows[:, 1:] != model.config.pad_token_id  # [B, T - 1]
        logits = model.get_output_embeddings()(hidden[targets])  # [N, V]
    return nn.functional.cross_entropy(logits.float(), rows[:, 1:][targets])
