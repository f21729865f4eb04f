"""Steps of training through a frozen LM in parts that fit into memory.

A part has a bounded number of padded tokens. The parts of a step are weighted so that their gradients add up, but for rounding,
to that of the undivided batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from recbole_llm.data.prompts import Example
from recbole_llm.llm.lora_inputs import SharedInputs
from recbole_llm.llm.memory import TrainingMemory, check_in_memory, checkpoints, micro_batch_tokens, training_memory
from recbole_llm.llm.packing import shared_batches
from recbole_llm.llm.sharding import whole
from recbole_llm.store.files import atomic_write
from recbole_llm.store.json_files import DamagedError, read_sealed, sealed
from recbole_llm.store.processes import current
from recbole_llm.training.loop import Epochs, LoopOptions

if TYPE_CHECKING:
    from torch import nn

logger = getLogger()

Encode = Callable[[Any, np.random.Generator], Example]
"""Encodes a training example; the generator draws its negative candidates, if any."""


class MicroBatches:
    """The examples of each step in parts: step ``s`` is a function of (seed, s), so training can resume at any step.

    Several processes share a step: each gets about as many rows.

    Args:
        tokens: padded tokens of a part; a longer example is a part of its own.
    """

    def __init__(self, examples: Sequence[Any], encode: Encode, batch_size: int, tokens: int, seed: int):
        self._examples, self._encode, self._tokens, self._seed = examples, encode, tokens, seed
        self._epochs = Epochs(len(examples), batch_size, seed)
        self.steps_per_epoch = self._epochs.steps

    def __getitem__(self, step: int) -> list[tuple[list[Example], float]]:
        """See :func:`parts`; every example is encoded once."""
        epoch, chosen = step // self.steps_per_epoch, self._epochs[step]
        encoded = [self._encode(self._examples[i], np.random.default_rng([self._seed, epoch, int(i)])) for i in chosen]
        return parts(encoded, self._tokens, current().size)


def parts(examples: Sequence[Example], tokens: int, processes: int = 1) -> list[tuple[list[Example], float]]:
    """Examples of similar length in batches of at most ``tokens`` padded tokens, with their shares of all answer tokens.

    The sum of their mean losses, each times its share, is the mean over all answer tokens. Batches without any are left out. They
    are for so many ``processes`` in turn.
    """
    lengths, answers = [len(example.row) for example in examples], [sum(example.mask[1:]) for example in examples]
    found = []
    for batch in shared_batches(lengths, tokens, processes):
        share = sum(answers[i] for i in batch) / max(1, sum(answers))
        if share or not sum(answers):  # without any answer, the loss raises an error
            found.append(([examples[i] for i in batch], share))
    return found


@contextmanager
def bounded_memory(lm: Any, options: LoopOptions, folder: Path, *, r: int | None = None, dropout: float = 0.0) -> Iterator[int]:
    """The padded tokens of a part in a training through ``lm``, whose layers are checkpointed as ``options`` say meanwhile.

    Tokens that are chosen from the memory are written to ``folder``. A training that resumes has the same parts, and so the same
    result, whatever is free by then; ``train_batch_tokens`` overrides them.

    Args:
        r, dropout: of the LoRA that is trained; None if gradients go to the input alone.
    """
    check_in_memory(lm)
    on = checkpoints(options.gradient_checkpointing, int(lm.num_parameters()))
    file = folder / "micro_batch.json"
    if options.batch_tokens is not None:
        tokens = options.batch_tokens
    elif file.is_file():
        try:
            tokens = int(read_sealed(file)["tokens"])
        except DamagedError as error:
            raise ValueError(f"{error}; delete {folder}, and this training begins anew") from error
    else:
        tokens = min(current().gather(_fitting_tokens(lm, options.max_memory, r=r, dropout=dropout, checkpointing=on)))
        if current().main:
            atomic_write(file, sealed({"tokens": tokens}))
    logger.info(f"micro-batches of {tokens:,} tokens" + (", layers computed again in the backward pass" if on else ""))
    with _checkpointed(lm) if on else _unchanged():
        yield tokens


def _fitting_tokens(lm: Any, max_memory: Mapping[Any, int | str] | None, **training: Any) -> int:
    """Tokens that fit on every device of ``lm``, over which its layers are spread; a power of two, so that it varies little."""
    memory = training_memory(lm.config, dtype=lm.get_input_embeddings().weight.dtype, **training)
    devices = {parameter.device for parameter in lm.parameters()} - {torch.device("meta")}
    own = TrainingMemory(-(-memory.per_token // len(devices)), memory.fixed)
    tokens = min(micro_batch_tokens(own, device, max_memory) for device in devices)
    return 1 << (tokens.bit_length() - 1)


def _anew(layer: nn.Module) -> Callable[..., Any]:
    """The forward pass of a layer, which draws all of its dropout: LoRA may read the layer's own input, the same tensor again."""
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        for module in layer.modules():
            if isinstance(module, SharedInputs):
                module.forget()
        with whole(layer):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _checkpointed(lm: nn.Module) -> Iterator[None]:
    """Compute each layer again in the backward pass.

    The switch of ``transformers`` does so in training mode only. A frozen LM around which soft tokens are trained stays in
    eval mode, since its own dropout is no part of the method.

    Raises:
        ValueError: the LM's class has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(lm).__name__} does not support it; give gradient_checkpointing: False")
    before = [layer.__dict__.get("forward") for layer in layers]  # accelerate sets one where a device_map is given
    for layer in layers:
        layer.forward = partial(checkpoint, _anew(layer), use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
