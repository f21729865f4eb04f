"""Checks that a PEFT folder belongs to a backbone, by name, modules, shapes and vocabulary; no weight of the backbone is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.llm.adapter_folders import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, Adapter, base_model_name, same_base
from recbole_llm.llm.causal_lm import blank_model
from recbole_llm.llm.identity import HUB_ID, first_line


def check_base(adapter: Adapter, folder: Path, backbone: str) -> None:
    """Check the name of the base model, where the adapter records one.

    Args:
        backbone: its folder or hub id.

    Raises:
        ValueError: it names another one.
    """
    found, expected = base_model_name(adapter.config), base_model_name({"base_model_name_or_path": backbone})
    if found is not None and not same_base(found, expected):
        raise ValueError(
            f"adapter {adapter.name!r} in {folder} was trained on {found!r}, but the backbone is {expected!r}; give "
            f"--llm_path of the former, or, if both are the same model, correct base_model_name_or_path in its {CONFIG_FILE}"
        )


def check_fit(adapter: Adapter, folder: Path, model_config: Any) -> None:
    """Check modules, shapes and vocabulary against a model that is built without memory, on torch's ``meta`` device.

    Args:
        model_config: the ``transformers`` configuration of the backbone.

    Raises:
        ValueError: what was found and what was expected.
    """
    where = f"adapter {adapter.name!r} in {folder}"
    _check_vocabulary(where, folder, model_config)
    try:
        expected = _expected_shapes(folder, model_config)
    except ValueError as error:  # peft finds none of the target modules
        raise ValueError(
            f"{where}: its target_modules {adapter.config.get('target_modules')!r} do not fit the backbone, a "
            f"{model_config.model_type} ({first_line(error)}); give an adapter of this backbone"
        ) from error
    except Exception as error:  # whatever peft raises for values of another type than it writes
        raise ValueError(f"{where}: peft cannot read its {CONFIG_FILE} ({first_line(error)}); save it again with peft") from error
    found = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{where} does not fit the backbone, a {model_config.model_type}: {key.removeprefix(KEY_PREFIX)} is "
                f"{_shown(found, key)} in its {WEIGHTS_FILE}, and the backbone with its {CONFIG_FILE} takes "
                f"{_shown(expected, key)}; give an adapter of this backbone"
            )


def _shown(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "absent"


def _expected_shapes(folder: Path, model_config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that peft saves for this config and model."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    model = blank_model(model_config)
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.init_lora_weights = True  # other kinds read the weights
    config.base_model_name_or_path = None  # peft warns if it differs from this model's
    peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check_vocabulary(where: str, folder: Path, model_config: Any) -> None:
    """Trainers save the tokenizer beside the adapter: it must not have more tokens than the backbone has embeddings."""
    from tokenizers import Tokenizer

    if not (file := folder / "tokenizer.json").is_file():
        return
    try:
        size = Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the tokenizers raise no narrower one
        raise ValueError(
            f"{where}: the tokenizer beside it cannot be read ({first_line(error)}); copy {file} again, or delete it if the "
            "adapter was trained without new tokens"
        ) from error
    rows = model_config.get_text_config().vocab_size
    if size > rows:
        raise ValueError(
            f"{where}: the tokenizer beside it has {size} tokens, but the backbone has {rows} embeddings; give an "
            "adapter that was trained without new tokens"
        )


def adapter_folder(given: str) -> Path:
    """The local folder of an adapter: a folder, or a hub id, ``owner/name`` or ``owner/name@revision``.

    Only the config and the safetensors are fetched; no code is.

    Raises:
        FileNotFoundError: neither; the error says what was tried.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder.resolve()
    name, _, revision = given.partition("@")
    if "/" not in name or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {given}; give a PEFT folder or a hub id such as owner/name")
    from huggingface_hub import hf_hub_download

    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            path = hf_hub_download(name, file, revision=revision or None)
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are of these two kinds
        raise FileNotFoundError(
            f"cannot load the adapter {given} ({re.sub(r'[.:]$', '', first_line(error))}). Tried the folder of that name, the "
            f"local cache (HF_HOME) and the hub; it needs {CONFIG_FILE} and {WEIGHTS_FILE} (pickled weights are not read). On a "
            f"machine with network access, run `hf download {name}` and give the folder"
        ) from error
    return Path(path).parent
