"""The planned memory of a training is what PyTorch allocates."""

from __future__ import annotations

import gc
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from recbole_llm.costs.lora import lora_cost
from recbole_llm.costs.parts import blank
from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.finetune import LoRATrainingConfig, finetune
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import LoopOptions
from recbole_llm.training.schedule import Schedule

TRAINING = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "use_rslora": False,
    "train_mode": "prefix",
    "samples": None,
    "positions": "all",
    "valid": "ranking",
    "held_out": 0.1,
    "epochs": 1,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "schedule": Schedule(),
    "max_grad_norm": 1.0,
    "eval_steps": None,
    "patience": 0,
    "seed": 0,
}


def llama(hidden: int, layers: int, vocabulary: int, **changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=changes.pop("inner", 3 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=changes.pop("heads", 4),
        num_key_value_heads=changes.pop("shared", 2),
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **changes,
    )


def examples(count: int, length: int, answer: int) -> list[Example]:
    return [Example(Prompt([5 + i] * length), [0] * (length - answer) + [1] * answer) for i in range(count)]


def peak_of(work: Any) -> int:
    """The largest number of bytes that a function holds at once, beside what was allocated before."""
    gc.collect()  # cycles left by an earlier measurement would be freed, and subtracted, in the middle of this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary", "answer"), [(512, 300, 4), (256, 20_000, 32)])
def test_a_training_allocates_what_is_planned(
    tokens: int, vocabulary: int, answer: int, checkpointing: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config, rows = llama(64, 6, vocabulary), examples(16, 64, answer)
    options = LoopOptions(show_progress=False, batch_tokens=tokens, gradient_checkpointing=checkpointing)
    outline = Outline(config, SimpleNamespace(pad_token_id=0), torch.float32, "cpu", False)
    given = (rows, lambda example, _: example, LoRATrainingConfig(**TRAINING))
    cost = lora_cost(outline, blank(outline), *given, validate=None, options=options)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    work = Work(tmp_path / "out", tmp_path / "scratch", None)
    (tmp_path / "scratch").mkdir()
    measured = peak_of(lambda: finetune(model, "own", *given, validate=None, work=work, options=options))
    planned = cost.peak - cost.memory["weights"]
    assert planned == pytest.approx(measured, rel=0.15), cost.memory
