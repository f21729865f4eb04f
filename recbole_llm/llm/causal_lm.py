"""A causal LM as a frozen part of a recommender: a folder or a Hugging Face hub id, loaded without running its code.

Weights come from safetensors only, remote code stays off, and the revision that was loaded is kept for the run record.
Everything that `transformers` already names keeps that name: dtype, device_map, attn_implementation, load_in_4bit.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.identity import HUB_ID, fingerprint
from recbole_llm.logs import hide_progress_bars


@dataclass(frozen=True)
class CausalLM:
    """A frozen backbone. name: folder name or hub id; revision: the hub's commit, None for a folder."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None


def load_causal_lm(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> CausalLM:
    """Load, freeze and place a causal LM and its tokenizer; a tokenizer without a pad token pads with its end token.

    path: a folder in the `save_pretrained` layout, or a hub id. revision: branch, tag or commit of the hub.
    dtype: 'auto' is bfloat16 on a CUDA device that has it, float32 elsewhere.
    device: default CUDA where there is one; `device_map` and `load_in_4bit` place the model themselves.
    Raises FileNotFoundError where nothing can be loaded from `path`, ValueError for an unknown dtype or a tokenizer
    without an end token, ImportError where 4-bit loading lacks bitsandbytes.
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
        options["device_map"] = device_map
    tokenizer = load_tokenizer(path, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, revision, error)) from error
    if not device_map:
        model = model.to(device)  # type: ignore[arg-type]
    folder = Path(source).is_dir()
    return CausalLM(
        model=model.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        name=Path(source).resolve().name if folder else source,
        revision=None if folder else getattr(model.config, "_commit_hash", None),
    )


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a causal LM; without a pad token it pads with its end token. Raises as :func:`load_causal_lm`."""
    from transformers import AutoTokenizer

    source = _source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, revision, error)) from error
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {source} has no end-of-text token, so no answer could end; set eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills holes: attention masks say what is padding
    return tokenizer


def identity(path: str | Path, revision: str | None = None) -> str:
    """What identifies a causal LM before it is loaded: its folder's :func:`fingerprint`, or ``id@commit`` of the hub."""
    from transformers import AutoConfig

    source = _source(path)
    if Path(source).is_dir():
        return fingerprint(source)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, revision, error)) from error
    return fingerprint(source, getattr(config, "_commit_hash", None) or revision)


def _source(path: str | Path) -> str:
    """A folder that exists or a possible hub id; a path that is neither never reaches the network."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if isinstance(path, Path) or not HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"llm_path: there is no folder {path}; give a folder with config.json, tokenizer.json "
            "and model.safetensors, a hub id such as Qwen/Qwen2.5-0.5B, or 'builtin'"
        )
    return path


def _not_found(source: str, revision: str | None, error: OSError) -> str:
    """What was tried, what `transformers` answered, what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        return (
            f"llm_path: the folder {source} holds no complete model ({reason}). It needs config.json, the "
            "tokenizer's files and *.safetensors; pickled weights (*.bin) are not read: save_pretrained() converts"
        )
    wanted = f"{source}@{revision}" if revision else source
    return (
        f"llm_path: cannot load {wanted} ({reason}). Tried the folder of that name, the local cache (HF_HOME) and "
        f"the hub. Download it where there is a network, `hf download {source}`, and point HF_HOME or "
        "llm_path to it; or use llm_path: builtin, which needs no download"
    )


def resolved_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision that ``dtype`` means on a device: ``auto`` is bfloat16 on a CUDA device that has it, float32 elsewhere."""
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
    """NF4 with double quantization, computing in `dtype`: the QLoRA setting."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit: true needs bitsandbytes: `pip install bitsandbytes`, or load_in_4bit: false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
