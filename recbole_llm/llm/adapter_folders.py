"""PEFT folders of LoRA adapters: what a folder must hold to be used, merged or folded, checked in one place.

An adapter that passes :func:`read_adapter` is exactly ``dW = s B A`` in each of its modules, with ``s = alpha / r`` (rsLoRA:
``/ sqrt(r)``), and all its values are finite. Only safetensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.store.files import check_sum, fingerprint, sha256_file
from recbole_llm.store.json_files import DamagedError, read_object

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PICKLED_FILE = "adapter_model.bin"
LARGEST_CONFIG = 2**24
_MOST = 1e300  # a larger whole number of JSON is no float
_LONGEST_PATTERN, _REPETITIONS = 10_000, 6
KEY_PREFIX = "base_model.model."

# settings of peft's LoraConfig that may have any value: the adapter is still exactly s * B A
_EXACT_KEYS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config"),
    "inference_mode",
}
_EXACT_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others (PiSSA, OLoRA, ...) change the base weights
_FACTOR = re.compile(re.escape(KEY_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_DEQUANTISED = re.compile(r"^(.+[.-](?:I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F16|F32))-[0-9a-f]{12}$", re.IGNORECASE)  # of a GGUF file
_SNAPSHOT = re.compile(r"models--(.+?)--(.+?)/snapshots/[^/]+/?$")  # a folder of the hub's cache


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, detached from any model.

    Args:
        config: the contents of peft's ``adapter_config.json``.
        tensors: peft's keys -> ``lora_A`` ``[r, D_in]`` and ``lora_B`` ``[D_out, r]``.
        name: used in messages and in the model card.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    name: str

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules within the base model, in the order of the file."""
        return list(dict.fromkeys(_parse(self, key)[0] for key in self.tensors))

    def has(self, module: str) -> bool:
        """Whether this adapter changes the module."""
        return factor_key(module, "A") in self.tensors

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``s A`` ``[r, D_in]`` and ``B`` ``[D_out, r]`` of one module, in fp32; ``dW = B (s A)``."""
        a, b = (self.tensors[factor_key(module, factor)].float() for factor in "AB")
        return a * self.scaling(module), b

    def widths(self, module: str) -> tuple[int, int]:
        """``(D_out, D_in)`` of one module."""
        return self.tensors[factor_key(module, "B")].shape[0], self.tensors[factor_key(module, "A")].shape[1]

    def rank(self, module: str) -> int:
        """``r`` of one module, by peft's rule for ``rank_pattern``."""
        return int(self._of_module("r", "rank_pattern", module))

    def scaling(self, module: str) -> float:
        """``s`` of one module, by peft's rules for ``alpha_pattern`` and rsLoRA."""
        alpha, rank = self._of_module("lora_alpha", "alpha_pattern", module), self.rank(module)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _of_module(self, key: str, pattern: str, module: str) -> float:
        from peft.utils.other import get_pattern_key

        by_module: dict[str, float] = self.config.get(pattern) or {}
        everywhere: float = self.config.get(key, 8)  # peft's default of both
        return by_module.get(get_pattern_key(list(by_module), module), everywhere)


def factor_key(module: str, factor: str) -> str:
    """peft's key of the factor ``A`` or ``B`` of a module."""
    return f"{KEY_PREFIX}{module}.lora_{factor}.weight"


def read_config(folder: Path, name: str | None = None) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA folder with safetensors; pickled ``.bin`` weights are refused.

    Raises:
        FileNotFoundError: names the file that is missing.
        ValueError: it is no JSON object, not that of a LoRA, a rank or alpha is no usable number, or a pattern may not end.
    """
    if (folder / PICKLED_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        raise FileNotFoundError(
            f"{folder} has a pickled {PICKLED_FILE}, which can execute code when loaded, and no {WEIGHTS_FILE}; save it again as "
            "safetensors with peft's save_pretrained"
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not a PEFT adapter in safetensors format: it has no {file}")
    try:
        config = read_object(folder / CONFIG_FILE, LARGEST_CONFIG)
    except DamagedError as error:
        raise ValueError(f"{error}; copy the folder again") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"adapter {name or folder.name!r} in {folder}: peft_type {kind!r} cannot be summed, only LORA can; give a LoRA"
        )
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise ValueError(f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r}, not a text; correct it")
    _check_numbers(config, folder / CONFIG_FILE)
    _check_patterns(config, folder / CONFIG_FILE)
    return config


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        by_module = config.get(pattern) or {}
        if not isinstance(by_module, dict):
            raise ValueError(f"{file}: {pattern} is {by_module!r}, not an object from modules to numbers")
        for name, value in {key: config.get(key, 8), **{f"{pattern}[{part!r}]": v for part, v in by_module.items()}}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST
            if not number or (key == "r" and (value < 1 or value != int(value))):
                wanted = "a whole number of at least 1" if key == "r" else "a finite number"
                raise ValueError(f"{file}: {name} is {value!r}, not {wanted}; correct it, or train the adapter again")


def _check_patterns(config: Mapping[str, Any], file: Path) -> None:
    """Refuse regular expressions that match names of modules for ever: groups that are repeated, or many repetitions."""
    layers = config.get("layers_pattern")
    given = [(key, config.get(key)) for key in ("target_modules", "exclude_modules")]
    given += [("layers_pattern", one) for one in (layers if isinstance(layers, list) else [layers])]
    given += [(key, name) for key in ("rank_pattern", "alpha_pattern") for name in config.get(key) or ()]
    for key, pattern in given:
        if not isinstance(pattern, str):
            continue
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{file}: {key}: {pattern[:80]!r} is no regular expression ({error}); correct it") from error
        plain = re.sub(r"\\.|\[[^]]*\]", "x", pattern)
        if len(pattern) > _LONGEST_PATTERN or re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > _REPETITIONS:
            raise ValueError(
                f"{file}: {key}: {pattern[:80]!r} repeats a group, or has more than {_REPETITIONS} repetitions or "
                f"{_LONGEST_PATTERN:,} characters, so that it may match for ever; list the modules by name"
            )


def read_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read a PEFT folder (safetensors only).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, a value that is not finite, or as :func:`read_config` and :func:`check_exact`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder, name)
    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            check_sum(folder / file)
    except DamagedError as error:
        raise ValueError(f"{error}; copy or train it again") from error
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged ({error}); copy or train it again") from error
    adapter = Adapter(config, dict(sorted(tensors.items())), name or folder.name)
    try:
        check_exact(adapter)
    except ValueError as error:
        raise ValueError(f"{error}; its folder is {folder}") from error
    for key, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter {adapter.name!r} in {folder}: {key} has values that are NaN or infinite; train it again")
    return adapter


def check_exact(adapter: Adapter) -> None:
    """Check that an adapter is exactly ``s B A``; the error names the setting or the tensor.

    Raises:
        ValueError: DoRA, biases, full modules, no tensor at all, a tensor that is not one of a pair of matrices, or a rank that
            is not the one of the config.
    """
    from peft import LoraConfig

    config = adapter.config
    if not adapter.tensors:
        raise ValueError(f"adapter {adapter.name!r}: {WEIGHTS_FILE} holds no tensor")
    for key, tensor in adapter.tensors.items():  # before the settings, since it says more than modules_to_save
        if key.endswith(".base_layer.weight"):
            raise ValueError(
                f"adapter {adapter.name!r}: it holds {key}, the base model's own matrix, which peft saves with an adapter of "
                "lm_head or the embeddings; save it again with save_pretrained(..., save_embedding_layers=False)"
            )
        if _FACTOR.fullmatch(key) is None and key.endswith((".embed_tokens.weight", ".lm_head.weight", ".wte.weight")):
            raise ValueError(
                f"adapter {adapter.name!r}: it holds the whole matrix {key} of {len(tensor)} tokens, so it was trained with a "
                "vocabulary of its own and is not exactly s * B A; train it without new tokens and without modules_to_save"
            )
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        exact = value in _EXACT_INITS if key == "init_lora_weights" else not value or value == defaults.get(key)
        if key not in _EXACT_KEYS and not exact:
            raise ValueError(f"adapter {adapter.name!r}: with {key}={value!r} it is not exactly s * B A and cannot be summed")
    for key, tensor in adapter.tensors.items():
        module, factor = _parse(adapter, key)
        if tensor.dim() != 2 or factor_key(module, "B" if factor == "A" else "A") not in adapter.tensors:
            raise ValueError(f"adapter {adapter.name!r}: {key} is not one of two matrices A and B")
        rank, found = adapter.rank(module), tensor.shape[0 if factor == "A" else 1]
        if found != rank:
            raise ValueError(f"adapter {adapter.name!r}: {key} has rank {found}, but its {CONFIG_FILE} says {rank}")


def check_changes(adapter: Adapter, folder: Path) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        ValueError: in every module, ``s`` or the product ``B A`` is zero.
    """
    scaled = [module for module in adapter.modules if adapter.scaling(module)]
    for module in scaled:
        a, b = (adapter.tensors[factor_key(module, factor)] for factor in "AB")
        if bool(((a != 0).any(1) & (b != 0).any(0)).any()):
            return
    why = "every B A is zero, as before training" if scaled else "lora_alpha is 0"
    raise ValueError(f"adapter {adapter.name!r} in {folder} changes nothing: {why}; give a trained one")


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of an adapter's weights and config."""
    return fingerprint([sha256_file(folder / WEIGHTS_FILE), read_config(folder)])


def base_model_name(config: Mapping[str, Any]) -> str | None:
    """The base model of an adapter: a hub id, or the name of a folder without its path, since folders may be moved."""
    base = (config.get("base_model_name_or_path") or "").rstrip("/") or None
    if base and (cached := _SNAPSHOT.search(base)):
        return f"{cached[1]}/{cached[2]}"
    if not base or (base.count("/") <= 1 and not Path(base).is_absolute()):
        return base
    return _DEQUANTISED.sub(r"\1", Path(base).name)


def same_base(one: str | None, other: str | None) -> bool:
    """Whether two results of :func:`base_model_name` may be one model: a folder has the last part of a hub id as its name."""
    if one is None or other is None or ("/" in one and "/" in other):
        return one == other
    return one.rpartition("/")[2].lower() == other.rpartition("/")[2].lower()


def check_same_base(first: Adapter, other: Adapter) -> None:
    """Refuse two adapters of different base models.

    Raises:
        ValueError: names the adapters, the base models and, where one is not recorded, the remedy.
    """
    one, two = (base_model_name(adapter.config) for adapter in (first, other))
    if not same_base(one, two):
        unknown = first.name if one is None else other.name if two is None else None
        remedy = f"; if they have one, write it into the {CONFIG_FILE} of {unknown!r}, as base_model_name_or_path"
        raise ValueError(
            f"adapters {first.name!r} and {other.name!r} have different base models: {one!r} and {two!r}"
            + (remedy if unknown is not None else "")
        )


def _parse(adapter: Adapter, key: str) -> tuple[str, str]:
    match = _FACTOR.fullmatch(key)
    if match is None:
        raise ValueError(f"adapter {adapter.name!r}: {key} is not a LoRA factor of a linear layer and cannot be summed")
    return match["module"], match["factor"]
