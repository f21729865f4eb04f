"""Speed and memory: published figures of accelerators, and what this machine reaches on the shape of an LM."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.costs.shape import LMShape
from recbole_llm.llm.lora import attach_lora
from recbole_llm.store.costs import Tokens
from recbole_llm.store.files import preserved_random_state


@dataclass(frozen=True)
class Card:
    """Published peak figures of an accelerator.

    Attributes:
        bf16, fp32: dense matrix products, FLOP/s; fp32 without TF32.
        memory: bytes.
    """

    name: str
    bf16: float
    fp32: float
    memory: int
    source: str


GIB = 2**30
CARDS = {
    # tensor cores, dense: half of the figures "with sparsity" of the data sheets
    "h200": Card("NVIDIA H200 SXM", 989e12, 67e12, 141 * 10**9, "NVIDIA H200 data sheet"),
    "h100": Card("NVIDIA H100 SXM", 989e12, 67e12, 80 * GIB, "NVIDIA H100 data sheet"),
    "a100": Card("NVIDIA A100 80GB SXM", 312e12, 19.5e12, 80 * GIB, "NVIDIA A100 data sheet"),
    "l40s": Card("NVIDIA L40S", 362e12, 91.6e12, 48 * GIB, "NVIDIA L40S data sheet"),
    "l4": Card("NVIDIA L4", 121e12, 30.3e12, 24 * GIB, "NVIDIA L4 data sheet"),
    "a10": Card("NVIDIA A10", 125e12, 31.2e12, 24 * GIB, "NVIDIA A10 data sheet"),
    "v100": Card("NVIDIA V100 32GB SXM2 (no bf16: figure of fp16)", 125e12, 15.7e12, 32 * GIB, "NVIDIA V100 data sheet"),
    "t4": Card("NVIDIA T4 (no bf16: figure of fp16)", 65e12, 8.1e12, 16 * GIB, "NVIDIA T4 data sheet"),
    # with accumulation in fp32
    "4090": Card("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 24 * GIB, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "3090": Card("NVIDIA GeForce RTX 3090", 71e12, 35.6e12, 24 * GIB, "NVIDIA Ampere GA102 white paper, appendix A"),
}


@dataclass(frozen=True)
class Speed:
    """FLOP/s with and without gradients, memory in bytes, and where they come from."""

    train: float
    read: float
    memory: int | None
    source: str


def card(name: str) -> Card:
    """A card of the table.

    Raises:
        ValueError: there is none of that name.
    """
    if name.lower() not in CARDS:
        raise ValueError(f"--device={name}: unknown card; choose {', '.join(CARDS)}, or leave it out to measure this machine")
    return CARDS[name.lower()]


def of_card(found: Card, dtype: torch.dtype, efficiency: float) -> Speed:
    """The speed of a card at a share of its peak."""
    peak = (found.fp32 if dtype == torch.float32 else found.bf16) * efficiency
    kind = "fp32" if dtype == torch.float32 else "bf16"
    source = f"{found.name}, {found.memory / GIB:.0f} GiB, at {efficiency:.0%} of its {kind} peak ({found.source})"
    return Speed(peak, peak, found.memory, source)


def probe(config: Any, dtype: torch.dtype, device: str, seconds: float, memory: int | None) -> Speed:
    """The speed of this machine on two layers of an LM with random weights and a LoRA, measured for ``seconds``."""
    from transformers import AutoModelForCausalLM

    small = _of_layers(config, 2)
    shape = LMShape.of(small, dtype)
    rows, length = (8 if device == "cpu" else 128), 128  # a micro-batch that a run would take
    fed = rows * length
    operations = shape.flops(Tokens(1, fed, fed, fed * length, 2 * rows))
    with preserved_random_state():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device).requires_grad_(False)
        ids = torch.randint(0, shape.vocabulary, (rows, length), device=device)

        def run(some: Any) -> torch.Tensor:
            return some(input_ids=ids, use_cache=False, logits_to_keep=2).logits.float().logsumexp(-1).sum()

        with torch.no_grad():
            read = operations / _median_seconds(lambda: run(model.eval()), 0.4 * seconds, device)
        peft_model: Any = attach_lora(model, name="probe", r=16, lora_alpha=32, lora_dropout=0.05, seed=0)
        adapter = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        with torch.enable_grad():
            took = _median_seconds(lambda: run(peft_model.train()).backward(), 0.6 * seconds, device)
    source = f"this machine: {device}, {torch.get_num_threads()} threads, two layers of the LM measured"
    return Speed((2 * operations + 6 * adapter * fed) / took, read, memory, source)


def _of_layers(config: Any, layers: int) -> Any:
    """The configuration of the same LM with few layers and a small vocabulary."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    text.vocab_size = min(text.vocab_size, 4096)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, 0)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return small


def _median_seconds(work: Callable[[], Any], seconds: float, device: str) -> float:
    """Median seconds of one call, after a first one."""
    work()
    times: list[float] = []
    began = time.monotonic()
    while not times or (time.monotonic() - began < seconds and len(times) < 100):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
