"""The modules that ``target_modules`` names: peft adapts those of a list that it finds and says nothing of the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

ALL_LINEAR = "all-linear"


def check_targets(model: nn.Module, target_modules: str | Sequence[str]) -> None:
    """Check that each name of a list is that of a module, or that a regular expression fits one, and that these are linear.

    peft also adapts embeddings and convolutions, whose updates are no products of two matrices that can be merged.

    Raises:
        ValueError: names the key, the value and the linear layers of the model.
    """
    if target_modules == ALL_LINEAR:
        return
    modules, kind, problem = dict(model.named_modules()), type(model).__name__, ""
    if isinstance(target_modules, str):
        adapted = [name for name in modules if _fits(target_modules, name)]
        if not adapted:
            problem = f"a text is a regular expression of whole names, and {kind} has no such module"
    else:
        by_name = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in target_modules}
        adapted = [name for found in by_name.values() for name in found]
        if absent := [target for target, found in by_name.items() if not found]:
            problem = f"{kind} has no module {absent[0]!r}"
    others = [name for name in adapted if isinstance(modules[name], nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    problem = problem or (f"{others[0]!r} is no linear layer" if others else "" if adapted else "it names none")
    if problem:
        linear = ", ".join(linear_layers(model))
        raise ValueError(f"target_modules: {target_modules!r}: {problem}; give {ALL_LINEAR} or a list of linear layers: {linear}")


def linear_layers(model: Any) -> list[str]:
    """The last parts of the names of linear layers that take a LoRA, sorted: not the head, a router, or one named as experts are.

    Where experts are one tensor, such as ``gate_up_proj``, peft takes ``gate_proj`` of a shared expert for it, too.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    experts = {word for name, weight in model.named_parameters() if weight.dim() == 3 for word in _last(name).split("_")}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not head]
    names = {_last(name) for name in linear if not is_router(model.get_submodule(name))}
    return sorted(name for name in names if name.removesuffix("_proj") not in experts)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def beyond_text(model: Any) -> str | None:
    """A regular expression of the modules that no text passes through, of an LM that also reads images (Gemma 3); else None."""
    if model.config.get_text_config(decoder=True) is model.config:
        return None
    names = {id(module): re.escape(name) for name, module in model.named_modules()}
    decoder, head = (names.get(id(module), "") for module in (model.get_decoder(), model.get_output_embeddings()))
    return rf"(?!{decoder}\.|{head}$).*" if decoder else None


def is_router(module: nn.Module) -> bool:
    """Whether a layer chooses experts: some are linear by their class, but return more than a product (Llama 4, PhiMoE)."""
    return type(module).__name__.endswith("Router")


def _fits(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        return False
