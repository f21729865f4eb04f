"""A causal LM as a frozen part of a recommender: a folder or a Hugging Face hub id, loaded without running its code.

Only safetensors are read, and remote code is never run. Options have their names in `transformers`: dtype, device_map,
attn_implementation, load_in_4bit.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.identity import check_complete, checked_hub_id, fingerprint, first_line, not_on_hub
from recbole_llm.logs import hide_progress_bars


@dataclass(frozen=True)
class CausalLM:
    """A frozen backbone and its tokenizer."""

    model: Any
    tokenizer: Any


def load_causal_lm(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    max_memory: Any = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> CausalLM:
    """Load, freeze and place a causal LM and its tokenizer.

    path: a folder in the `save_pretrained` layout, or a hub id. revision: branch, tag or commit of the hub.
    dtype: see :func:`resolved_dtype`.
    device: CUDA by default if available; `device_map` (with `max_memory`) and `load_in_4bit` place the model themselves.
    Raises FileNotFoundError if nothing can be loaded from `path`, ValueError for an unknown dtype or a tokenizer
    without an end token, ImportError if `load_in_4bit` is set and bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM

    hide_progress_bars()
    source = _source(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": resolved_dtype(dtype, device), "use_safetensors": True}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if load_in_4bit:
        options["quantization_config"] = _four_bits(options["dtype"])
        device_map = device_map or {"": device}
    if device_map:
        options |= {"device_map": device_map, "max_memory": max_memory}
    tokenizer = load_tokenizer(path, revision)
    auto: Any = AutoModelForCausalLM  # its return type does not know output_loading_info
    try:
        model, loading = auto.from_pretrained(
            source, revision=revision, trust_remote_code=False, output_loading_info=True, **options
        )
        check_complete(loading)
    except OSError as error:
        raise _not_found(source, revision, error) from error
    if not device_map:
        model = model.to(device)
    return CausalLM(model.requires_grad_(False).eval(), tokenizer)


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a causal LM; one without a pad token pads with its end token. Raises as :func:`load_causal_lm`."""
    from transformers import AutoTokenizer

    source = _source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _not_found(source, revision, error) from error
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source} has no end-of-text token to end an answer with; set eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # attention masks tell the two apart
    return tokenizer


def load_outline(path: str | Path, revision: str | None = None) -> tuple[Any, Any]:
    """Configuration and tokenizer of a causal LM; a folder needs no weights. Raises as :func:`load_causal_lm`."""
    return _config(_source(path), revision), load_tokenizer(path, revision)


def identity(path: str | Path, revision: str | None = None) -> str:
    """The identity of a causal LM, without loading it: its folder's :func:`fingerprint`, or ``id@commit`` of the hub."""
    source = _source(path)
    if Path(source).is_dir():
        return fingerprint(source)
    return fingerprint(source, getattr(_config(source, revision), "_commit_hash", None) or revision)


def _config(source: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _not_found(source, revision, error) from error


def _source(path: str | Path) -> str:
    """An existing folder or a possible hub id; anything else raises an error without a network request."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    return checked_hub_id(path, "llm_path", "config.json, tokenizer.json and model.safetensors", "Qwen/Qwen2.5-0.5B")


def _not_found(source: str, revision: str | None, error: OSError) -> FileNotFoundError:
    if not Path(source).is_dir():
        return not_on_hub("llm_path", source, revision, error)
    return FileNotFoundError(
        f"llm_path: the folder {source} holds no complete model ({first_line(error)}). It needs config.json, the tokenizer's "
        "files and *.safetensors; pickled weights (*.bin) are not read: convert them with save_pretrained()"
    )


def resolved_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; ``auto`` is bfloat16 on a CUDA device with native support, float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    return found


def _four_bits(dtype: torch.dtype) -> Any:
    """NF4 with double quantization and computation in `dtype`, as in QLoRA."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit: true needs bitsandbytes: `pip install bitsandbytes`, or load_in_4bit: false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
