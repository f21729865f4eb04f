"""A causal LM as a frozen part of a recommender: a folder or a Hugging Face hub id, loaded without running its code.

Only safetensors are read, and remote code is never run. Options have their names in `transformers`: dtype, device_map,
attn_implementation, load_in_4bit.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.identity import check_complete, checked_hub_id, fingerprint, first_line, not_on_hub
from recbole_llm.llm.reading import Reading
from recbole_llm.llm.sharding import shard
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.processes import current

logger = getLogger()


@dataclass(frozen=True)
class CausalLM:
    """A frozen backbone, its tokenizer, and how it is run so that its results are exact."""

    model: Any
    tokenizer: Any
    reading: Reading = Reading()

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads batches; None if batches must not be padded."""
        return int(self.tokenizer.pad_token_id) if self.reading.padding else None

    @property
    def device_type(self) -> str:
        """That of the device of its input embeddings, such as ``cpu`` or ``cuda``."""
        return str(self.model.get_input_embeddings().weight.device.type)


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
    fsdp: bool = False,
) -> CausalLM:
    """Load, freeze and place a causal LM and its tokenizer.

    Args:
        path: a folder in the ``save_pretrained`` layout, or a hub id.
        revision: branch, tag or commit of the hub.
        dtype: see :func:`resolved_dtype`.
        device: CUDA by default if available; ``device_map`` (with ``max_memory``) and ``load_in_4bit`` place the LM themselves.
        fsdp: spread the layers over the processes of the run, if there are several; see :mod:`recbole_llm.llm.sharding`.

    Raises:
        FileNotFoundError: nothing can be loaded from ``path``.
        ValueError: an unknown dtype, no causal LM, one that cannot run the attention, or a tokenizer without an end token.
        ImportError: ``load_in_4bit`` is set and bitsandbytes is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    hide_progress_bars()
    source = _source(path)
    load_config(path, revision)  # says what is wrong with it
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
    try:
        model, loading = _from_pretrained(AutoModelForCausalLM, source, revision, options)
        check_complete(loading)
    except (OSError, SafetensorError) as error:
        raise _not_found(source, revision, error) from error
    except (AssertionError, RuntimeError) as error:
        if not device_map:
            raise
        raise ValueError(f"device_map: {device_map}: {source} cannot be placed ({first_line(error)}); give auto") from error
    model.requires_grad_(False).eval()
    if fsdp and current().size > 1:
        model = shard(model, current(), device)
    elif not device_map:
        model = model.to(device)
    elif model.get_input_embeddings().weight.device.type == "meta":
        raise ValueError(f"device_map: {device_map} and max_memory: {max_memory} leave no device for the embeddings of {source}")
    read_slices(model)
    return CausalLM(model, tokenizer)


def read_slices(model: Any) -> None:
    """Have ``lm_head`` read slices of states [B, T, D], such as the last ones; on a CPU, torch copies its matrix for each row."""

    def contiguous(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = inputs
        return states.contiguous().flatten(0, -2).view(states.shape), *others  # a slice of one row keeps its strides until here

    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(contiguous)


def _from_pretrained(auto: Any, source: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and what of it was found; in eager attention, if it has no sdpa, which computes the same."""
    fixed = {"revision": revision, "trust_remote_code": False, "output_loading_info": True}
    attention = options.get("attn_implementation")
    try:
        return auto.from_pretrained(source, **fixed, **options)
    except (ValueError, ImportError) as error:
        if attention == "sdpa":
            model = _from_pretrained(auto, source, revision, options | {"attn_implementation": "eager"})
            logger.warning(f"attn_implementation: sdpa cannot run {source} ({first_line(error)}); eager takes its place")
            return model
        keys = "llm_path" if attention in (None, "eager") else f"attn_implementation: {attention}, llm_path"
        remedy = "choose a causal LM of text" if keys == "llm_path" else "choose attn_implementation: sdpa or eager"
        raise ValueError(f"{keys}: {source} cannot be loaded ({first_line(error)}); {remedy}") from error


def load_config(path: str | Path, revision: str | None = None) -> Any:
    """The ``config.json`` of a causal LM, without its weights. Raises as :func:`load_causal_lm`."""
    from transformers import AutoConfig

    source = _source(path)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _not_found(source, revision, error) from error
    except Exception as error:  # an architecture that transformers does not know, code of its own, or a damaged file
        raise ValueError(
            f"llm_path: {source}: its config.json cannot be read ({first_line(error)}); choose an LM whose code is part of the "
            f"installed transformers {version('transformers')}, or install a version that has it; code from a hub is never run"
        ) from error


def blank_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The LM of a configuration without the memory of its weights, on the device ``meta``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # no attention is computed, and eager needs no package
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a causal LM; one without a pad token pads with its end token. Raises as :func:`load_causal_lm`."""
    from transformers import AutoTokenizer

    source = _source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _not_found(source, revision, error) from error
    except Exception as error:  # whatever transformers and tokenizers raise for missing or damaged files
        reason = f"its tokenizer cannot be read: {first_line(error)}"
        raise ValueError(f"llm_path: {source}: {reason}; give a folder with the tokenizer.json of the LM") from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"llm_path: the tokenizer of {source} has no end-of-text token to end an answer with; set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # attention masks tell the two apart
    return tokenizer


def identity(path: str | Path, revision: str | None = None) -> str:
    """The identity of a causal LM, without loading it: its folder's :func:`fingerprint`, or ``id@commit`` of the hub."""
    source = _source(path)
    if Path(source).is_dir():
        return fingerprint(source)
    return fingerprint(source, getattr(load_config(source, revision), "_commit_hash", None) or revision)


def check_weights(path: str | Path, revision: str | None = None) -> None:
    """Raise a FileNotFoundError if a causal LM has no weights in safetensors, which are the only ones that are read."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, has_file

    source = _source(path)
    if Path(source).is_dir():
        if not any(Path(source).glob("*.safetensors")):
            raise _not_found(source, revision, OSError("no *.safetensors"))
        return
    # asks the hub for headers, or the local cache; no weights are downloaded
    if not any(has_file(source, name, revision=revision) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise FileNotFoundError(
            f"llm_path: {source}@{revision or 'main'} has no safetensors, and pickled weights are not read. Give "
            f"llm_revision, if a revision has them, or {_convert(source, revision, Path(source).name + '-safetensors')}"
        )


def _source(path: str | Path) -> str:
    """An existing folder or a possible hub id; anything else raises an error without a network request.

    A folder with a PEFT adapter is refused: ``transformers`` would load its base model, or the adapter into the model beside it.
    """
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"llm_path: {folder} holds a PEFT adapter (adapter_config.json), not an LM alone; give its base model as llm_path "
            f"and the folder in `adapters`, or fold it: `recbole-llm merge --adapters={folder} --out=NEW --full_model=LM` and "
            "--llm_path=LM"
        )
    if folder.is_dir():
        return str(folder)
    return checked_hub_id(path, "llm_path", "config.json, tokenizer.json and model.safetensors", "Qwen/Qwen2.5-0.5B")


def _not_found(source: str, revision: str | None, error: Exception) -> FileNotFoundError:
    if not Path(source).is_dir():
        return not_on_hub("llm_path", source, revision, error)
    return FileNotFoundError(
        f"llm_path: the folder {source} holds no complete model ({first_line(error)}). It needs config.json, the tokenizer's "
        f"files and *.safetensors; pickled weights (*.bin) are not read: {_convert(source, None, source + '-safetensors')}"
    )


def _convert(source: str, revision: str | None, target: str) -> str:
    """The command that converts pickled weights, which executes what is in them."""
    at = f", revision='{revision}'" if revision else ""
    return (
        'if you trust the file, convert it once, `python -c "'
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained('{source}'{at}, use_safetensors=False, dtype='auto').save_pretrained('{target}'); "
        f"T.from_pretrained('{source}'{at}).save_pretrained('{target}')\"`, and give --llm_path={target}"
    )


def resolved_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; ``auto`` is bfloat16 on a CUDA device with native support, float32 elsewhere.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    return found


def check_bitsandbytes() -> None:
    """Raise an ImportError if ``load_in_4bit`` is not possible."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit: True needs bitsandbytes: `pip install bitsandbytes`, or load_in_4bit: False")


def _four_bits(dtype: torch.dtype) -> Any:
    """NF4 with double quantization and computation in `dtype`, as in QLoRA."""
    check_bitsandbytes()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
