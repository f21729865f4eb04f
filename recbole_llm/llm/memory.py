"""The memory of training through a frozen causal LM, and the size of its micro-batches.

The activations that PyTorch keeps for the backward pass are counted from the configuration of the LM, for decoder layers as
those of Llama, Qwen and Mistral: RMSNorm in fp32, SDPA, a gated feed-forward layer; others need less. Each distinct input of
LoRA layers (q, k and v share one, gate and up another) is kept once, after dropout, in the fp32 of the adapters.
``tests/llm/test_memory.py`` compares the count with the tensors that autograd saves.

Legend: H width, A width of the queries, K of the keys, F of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from recbole_llm.compat import available_memory_bytes

FP32 = 4  # bytes
LOGITS_AT_ONCE = 2**24  # logits that the training loss computes at a time
CHECKPOINT_ABOVE = 1_000_000_000  # weights, for gradient_checkpointing: auto
MOST_TOKENS = {"cpu": 1024, "other": 16384}  # of a micro-batch; more are hardly faster
SHARE = {"cpu": 0.25, "other": 0.8}  # of the free memory that activations may take
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that the forward and backward passes of training need beside the weights.

    Attributes:
        per_token: activations of a padded token.
        fixed: those that do not grow with the tokens: the logits computed at a time, and their gradients.
    """

    per_token: int
    fixed: int

    def bytes(self, tokens: int) -> int:
        """Bytes of a micro-batch of padded tokens."""
        return self.fixed + tokens * self.per_token

    def tokens(self, free: int) -> int:
        """The padded tokens that fit into ``free`` bytes, at least 1."""
        return max(1, (free - self.fixed) // self.per_token)


def training_memory(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    r: int | None = None,
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> TrainingMemory:
    """The memory of training through a frozen LM.

    Args:
        config: the LM's, from ``transformers``.
        dtype: the LM's.
        r: rank of a LoRA on all linear layers; None: only the input embeddings get gradients (soft tokens).
        dropout: that of LoRA.
        checkpointing: layers are computed again in the backward pass, so that one at a time keeps its activations.
    """
    text = config.get_text_config(decoder=True)
    width, layers, size = text.hidden_size, text.num_hidden_layers, dtype.itemsize
    heads = _largest(text, "num_attention_heads", default=1)
    head = _largest(text, "head_dim", default=width // heads)
    queries, keys = heads * head, _largest(text, "num_key_value_heads", default=heads) * head
    inner = _largest(text, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", default=4 * width)
    inner *= _largest(text, "num_experts_per_tok", default=1)
    layer = 2 * (width + 1) * FP32  # the input of each norm in fp32, and its scale
    layer += (2 * queries + 2 * keys) * size + heads * FP32  # q, k, v, the output of attention and its log-sum-exp
    layer += 3 * inner * size  # gate, SiLU(gate), up
    if r is not None:
        inputs = 2 * width + inner + (queries if dropout or size != FP32 else 0)  # the output of attention may be kept as it is
        layer += inputs * (FP32 + (dropout > 0)) + 7 * r * FP32  # with their masks, and A x
    embeddings, last = width * size, (width + 1) * FP32 + 2 * width * size  # norm; states and gradients at lm_head
    kept = layers * width * size + layer if checkpointing else layers * layer
    at_once = max(LOGITS_AT_ONCE, text.vocab_size)
    return TrainingMemory(embeddings + kept + last, at_once * (size + FP32 if size == FP32 else 2 * size + 2 * FP32))


def by_layer(config: Any, *names: str, default: int) -> list[int]:
    """The first of these sizes that a configuration has, for each layer."""
    for name in names:
        try:
            found = getattr(config, name, None)
        except RuntimeError:  # transformers does not read a size that differs between layers from the whole (Gemma 4)
            found = [getattr(layer, name) for layer in config.per_layer_config]
        if found:
            sizes = found if isinstance(found, list | tuple) else [found] * config.num_hidden_layers
            return [int(size) for size in sizes[: config.num_hidden_layers]]
    return [default] * config.num_hidden_layers


def _largest(config: Any, *names: str, default: int) -> int:
    return max(by_layer(config, *names, default=default))


def checkpoints(config: bool | str, weights: int) -> bool:
    """Whether layers are computed again in the backward pass: ``gradient_checkpointing`` of an LM with so many weights.

    Raises:
        ValueError: it is neither True, False nor ``auto``.
    """
    if config not in (True, False, "auto"):
        raise ValueError(f"gradient_checkpointing: {config!r} is unknown; choose True, False or auto")
    return weights > CHECKPOINT_ABOVE if config == "auto" else bool(config)


def free_memory(device: torch.device, max_memory: Mapping[Any, int | str] | None = None) -> int:
    """Bytes that are free on a device: at most those that ``max_memory`` leaves to this process, as in ``transformers``.

    Raises:
        ValueError: a size of ``max_memory`` is no number of bytes.
    """
    if device.type == "cpu":
        free, used = available_memory_bytes(), psutil.Process().memory_info().rss
    elif device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        free, used = torch.cuda.mem_get_info(index)[0], torch.cuda.memory_allocated(index)
        free += torch.cuda.memory_reserved(index) - used  # what the allocator has cached
    else:
        free, used = available_memory_bytes() // 2, 0  # mps and others share the memory, or do not tell
    key = "cpu" if device.type == "cpu" else device.index or 0
    if max_memory is not None and key in max_memory:
        return max(0, min(free, size_in_bytes(max_memory[key]) - used))
    return free


def micro_batch_tokens(
    memory: TrainingMemory, device: torch.device, max_memory: Mapping[Any, int | str] | None = None, taken: int = 0
) -> int:
    """Padded tokens of a micro-batch on a device, beside what it holds now and ``taken`` bytes more.

    On a CPU activations take at most a quarter of the free memory, since other programs run there, and at most 1,024 tokens:
    SmolLM2-135M then needs about 2 GB beside its weights.
    """
    free = free_memory(device, max_memory) - taken
    return tokens_in(memory, free, "cpu" if device.type == "cpu" else "other")


def tokens_in(memory: TrainingMemory, free: int, kind: str) -> int:
    """Padded tokens of a micro-batch in so many free bytes of a ``cpu`` or ``other`` device."""
    return min(MOST_TOKENS[kind], memory.tokens(int(free * SHARE[kind])))


def size_in_bytes(size: int | str) -> int:
    """The number of bytes of a number, or of text such as ``20GiB``, as ``accelerate`` reads it.

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(size, int):
        return size
    text = str(size).strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * _UNITS[unit])
            except ValueError:
                break
    raise ValueError(f"max_memory: {size!r} is not a size; give bytes or text such as 20GiB")


def check_in_memory(model: Any) -> None:
    """Refuse to train through an LM of which accelerate keeps weights elsewhere, or to add adapters to it.

    Raises:
        ValueError: names the key, and one of the weights.
    """
    names = [name for name, _ in model.named_parameters()]
    off = [name for name, weights in model.named_parameters() if weights.device.type == "meta"]
    if 0 < len(off) < len(names):  # all: a blank model, of a plan
        raise ValueError(
            f"max_memory: {len(off)} weights of the LM are offloaded, such as {off[0]}: it can be read, but not be trained "
            "through, nor take adapters; give more max_memory, load_in_4bit: True, or fsdp: True with several processes"
        )


def check_max_memory(max_memory: Mapping[Any, int | str] | None) -> None:
    """Check the devices and sizes of ``max_memory``.

    Raises:
        ValueError: a device that ``accelerate`` does not know, or a size that is none.
    """
    for device, size in (max_memory or {}).items():
        if (isinstance(device, str) and device not in ("cpu", "mps", "disk")) or isinstance(device, bool):
            raise ValueError(f"max_memory: {device!r} is no device; give the number of an accelerator, such as 0, or cpu")
        size_in_bytes(size)
