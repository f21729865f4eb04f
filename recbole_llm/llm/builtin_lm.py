"""The builtin LM: a small Llama trained on the spot, so that the first command works on any machine, offline.

Its tokenizer is a byte-level BPE of the catalogue's titles. Its training data are the training split's histories, as
prompts write them, ``<s>title\\ntitle\\n...``, in windows in which every token is a target. What it knows is which
titles follow which: it is never passed off as a pretrained LLM. It is saved as an ordinary ``transformers`` folder, so
that the code that runs Qwen runs it.

Three choices make a minute or two on a CPU enough. Words may merge into whole titles, frequent ones first: a history
then takes a third of the tokens. Muon trains the matrices (``training/muon.py``). Batches are small: at this size the
number of steps counts for more than the quiet of each.
"""

from __future__ import annotations

import math
from collections import Counter
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
from recbole_llm.llm.windows import Histories, WindowBatches
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.stages import Stage, Work
from recbole_llm.training.loop import DEFAULT_OPTIONS, LoopOptions, TrainingLoop, cosine_with_warmup
from recbole_llm.training.muon import MuonAdamW

logger = getLogger()

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SEPARATOR = "\n"


@dataclass(frozen=True)
class BuiltinLMConfig:
    """Size and training of the builtin LM.

    Attributes:
        vocab_size: largest number of tokens; 256 bytes and 3 special tokens are always there.
        hidden_size, num_layers, num_heads: of the Llama; its feed-forward layers are 8/3 as wide, as in Llama.
        window: titles in a training row.
        max_title_tokens: longer titles are cut, as in prompts.
        tokens: budget, counted in predicted tokens; the cost does not depend on the machine, only the time does.
        epochs: passes over the histories after which training ends although tokens are left.
        batch_tokens: tokens of an optimiser step, padding included.
        learning_rate: of embeddings and norms (AdamW).
        matrix_learning_rate, weight_decay: of all other weights (Muon).
        warmup_ratio: share of the steps with rising learning rates, then a cosine.
        dtype: ``float32``, or ``bfloat16`` for training under autocast; weights are kept in float32.
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
        """The settings of a property file; an unknown key is named with its nearest neighbour."""
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
        titles, histories = united(domains)
        train_builtin_lm(
            work.out,
            titles=titles,
            histories=histories,
            config=config,
            seed=seed,
            scratch=work.scratch,
            options=options,
        )

    depends = {"config": asdict(config), "domains": [domain.fingerprint for domain in domains], "seed": seed}
    return Stage("builtin-lm", depends, build)


def train_builtin_lm(
    folder: Path,
    *,
    titles: Sequence[str],
    histories: Histories,
    config: BuiltinLMConfig | None = None,
    seed: int = 2020,
    scratch: Path | None = None,
    options: LoopOptions = DEFAULT_OPTIONS,
) -> None:
    """Train the builtin LM and write it to ``folder`` as config.json, model.safetensors and the tokenizer's files.

    The result depends on the arguments alone: bit-equal on one CPU, whatever the global random state, in one go
    or killed and resumed.

    Args:
        titles: item id -> title as prompts show it; an empty one stands for the padding item.
        histories: item ids of each user in time order, of the training split only.
        scratch: folder for the state of an unfinished training, which a later call goes on from; None keeps nothing.

    Raises:
        ValueError: no titles, no history, or an item id without a title.
    """
    config = config or BuiltinLMConfig()
    _check(titles, histories)
    counts = Counter(chain.from_iterable(map(np.ndarray.tolist, map(np.asarray, histories))))
    tokenizer = train_tokenizer(titles, [counts[item] for item in range(len(titles))], config.vocab_size)
    end = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    answers = [row[: config.max_title_tokens] + end for row in tokenise_as_text(tokenizer, titles)]
    batches = WindowBatches(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(config, len(tokenizer))
    logger.info(
        f"builtin LM: {model.num_parameters():,} weights, {len(tokenizer)} tokens, "
        f"{np.mean([len(answer) for answer in answers]):.1f} a title; {len(batches)} steps"
    )
    optimizer = new_optimizer(model, config)
    TrainingLoop(
        name="builtin-lm",
        parameters=dict(model.named_parameters()),
        optimizer=optimizer,
        scheduler=cosine_with_warmup(optimizer, len(batches), config.warmup_ratio),
        loss=lambda step: lm_loss(model, batches[step], config.dtype),
        total_steps=len(batches),
        folder=scratch / "loop" if scratch else None,
        options=options,
        learning_rate_key="builtin_lm.matrix_learning_rate",
    ).run()
    hide_progress_bars()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(titles: Sequence[str], histories: Histories) -> None:
    if not any(titles):
        raise ValueError("titles: no item has one, so there is nothing to train the builtin LM on")
    if not any(len(history) for history in histories):
        raise ValueError("histories: the training split is empty, so there is nothing to train the builtin LM on")
    for user, history in enumerate(histories):
        if len(history) and not 0 <= min(history) <= max(history) < len(titles):
            raise ValueError(f"histories: item {max(history, key=abs)} of history {user} has no title, there are {len(titles)}")


def train_tokenizer(titles: Sequence[str], counts: Sequence[int], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer in which whole titles may become one token, those with the largest counts first.

    Every Unicode text goes through it unchanged. ``<s>`` and the like in a text are text: only ids make them special.
    A title counts with the root of its count, so that rare ones keep a say.
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
    """An untrained Llama of the configured size, with one matrix for embeddings and output."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
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
    return LlamaForCausalLM(llama).train()


def new_optimizer(model: Any, config: BuiltinLMConfig) -> MuonAdamW:
    """Muon for the matrices between hidden states, AdamW for embeddings (which are the output, too) and norms."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and "embed_tokens" not in name}
    return MuonAdamW(
        matrices.values(),
        [p for name, p in named.items() if name not in matrices],
        matrix_lr=config.matrix_learning_rate,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def lm_loss(model: Any, rows: Tensor, dtype: str = "float32") -> Tensor:
    """Mean negative log-likelihood of every token of ``rows`` [B, T] after the first, padding left out."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.model(input_ids=rows[:, :-1]).last_hidden_state  # [B, T - 1, D]
        read = rows[:, 1:] != model.config.pad_token_id  # [B, T - 1]
        logits = model.lm_head(hidden[read])  # [N, V]
    return nn.functional.cross_entropy(logits.float(), rows[:, 1:][read])
