"""Speed and memory: published figures of accelerators, and what this machine reaches on the shape of an LM."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_llm.costs.shape import LMShape
from recbole_llm.llm.causal_lm import read_slices
from recbole_llm.llm.lora import attach_lora
from recbole_llm.llm.lora_targets import linear_layers
from recbole_llm.llm.memory import tokens_in, training_memory
from recbole_llm.store.costs import Cost, Tokens
from recbole_llm.store.random_state import preserved_random_state


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
    has_bf16: bool = True  # else a run with dtype: auto takes float32


GIB = 2**30
LAYERS, LENGTH = 2, 128  # of the LM that a probe measures, and tokens of its rows
CARDS = {
    # tensor cores, dense: half of the figures "with sparsity" of the data sheets
    "h200": Card("NVIDIA H200 SXM", 989e12, 67e12, 141 * 10**9, "NVIDIA H200 data sheet"),
    "h100": Card("NVIDIA H100 SXM", 989e12, 67e12, 80 * GIB, "NVIDIA H100 data sheet"),
    "a100": Card("NVIDIA A100 80GB SXM", 312e12, 19.5e12, 80 * GIB, "NVIDIA A100 data sheet"),
    "l40s": Card("NVIDIA L40S", 362e12, 91.6e12, 48 * GIB, "NVIDIA L40S data sheet"),
    "l4": Card("NVIDIA L4", 121e12, 30.3e12, 24 * GIB, "NVIDIA L4 data sheet"),
    "a10": Card("NVIDIA A10", 125e12, 31.2e12, 24 * GIB, "NVIDIA A10 data sheet"),
    "v100": Card(
        "NVIDIA V100 32GB SXM2 (no bf16: figure of fp16)", 125e12, 15.7e12, 32 * GIB, "NVIDIA V100 data sheet", has_bf16=False
    ),
    "t4": Card("NVIDIA T4 (no bf16: figure of fp16)", 65e12, 8.1e12, 16 * GIB, "NVIDIA T4 data sheet", has_bf16=False),
    # with accumulation in fp32
    "4090": Card("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 24 * GIB, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "3090": Card("NVIDIA GeForce RTX 3090", 71e12, 35.6e12, 24 * GIB, "NVIDIA Ampere GA102 white paper, appendix A"),
}


@dataclass(frozen=True)
class Speed:
    """How fast an LM is trained and read.

    Attributes:
        train, read: FLOP/s with and without gradients.
        memory: bytes; None if unknown.
        train_pass, read_pass: seconds of a pass beside its operations: short passes wait for the memory and for Python.
    """

    train: float
    read: float
    memory: int | None
    source: str
    train_pass: float = 0.0
    read_pass: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The duration of the operations of a cost."""
        passes = self.train_pass * cost.trained.passes + self.read_pass * cost.read.passes
        return (cost.train_flops or 0) / self.train + (cost.read_flops or 0) / self.read + passes


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

    small = _of_layers(config, LAYERS)
    shape, layers = LMShape.of(small, dtype), config.get_text_config().num_hidden_layers
    training = training_memory(small, dtype=dtype, r=16, dropout=0.05)
    fitting = tokens_in(training, memory - 2 * shape.weight_bytes, "other") if memory and device != "cpu" else 8 * LENGTH
    rows = max(1, min(128, fitting // LENGTH))
    long, short = (rows, LENGTH), (1, 16)  # rows and tokens: a micro-batch of a run, and a short pass
    with preserved_random_state():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device).requires_grad_(False)
        read_slices(model)

        def timed(step: Callable[[Tensor], Any], shares: tuple[float, float]) -> tuple[float, float]:
            ids = [torch.randint(0, shape.vocabulary, size, device=device) for size in (long, short)]
            times = [_median_seconds(partial(step, one), share * seconds, device) for one, share in zip(ids, shares, strict=True)]
            return times[0], times[1]

        def read(ids: Tensor) -> Tensor:
            return model(input_ids=ids, use_cache=False, logits_to_keep=2).logits.float().logsumexp(-1).sum()

        with torch.no_grad():
            model.eval()
            reading = timed(read, (0.3, 0.1))
        targets = linear_layers(model)  # not all-linear, which names the experts of a mixture, too
        model = attach_lora(model, name="probe", r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, seed=0).train()
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with torch.enable_grad():
            trained = timed(lambda ids: read(ids).backward(), (0.4, 0.2))

    def speed(times: tuple[float, float], factor: int, beside: int) -> tuple[float, float]:
        """FLOP/s of a long pass, and the seconds that a short one takes more, for all layers."""
        work = [factor * shape.flops(_fed(*size)) + beside * size[0] * size[1] for size in (long, short)]
        rate = work[0] / times[0]
        return rate, max(0.0, times[1] - work[1] / rate) * layers / LAYERS

    (train, train_pass), (read_rate, read_pass) = speed(trained, 2, 6 * adapter), speed(reading, 1, 0)
    threads = torch.get_num_threads()
    source = f"this machine: {device}, {threads} {'thread' if threads == 1 else 'threads'}, two layers of the LM measured"
    return Speed(train, read_rate, memory, source, train_pass, read_pass)


def _fed(rows: int, length: int) -> Tokens:
    """The tokens of a pass of the probe."""
    return Tokens(1, rows * length, rows * length, rows * length * length, 2 * rows)


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
