"""The base model with an adapter folded into its weights: an ordinary ``transformers`` folder that needs no peft.

``W + s B A`` is computed in fp32, one matrix at a time, and rounded once, without bias, to the dtype of the base model's files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.adapter_fit import check_fit
from recbole_llm.llm.adapter_folders import Adapter, adapter_fingerprint, read_adapter
from recbole_llm.llm.causal_lm import blank_model, identity, load_causal_lm, load_config
from recbole_llm.llm.folding import rounded
from recbole_llm.merging.arithmetic import MERGE_FILE
from recbole_llm.store.files import DamagedError, atomic_folder, is_complete, verify
from recbole_llm.store.json_files import read_object

logger = getLogger()

CARD_FILE = "full_model.json"  # what the folder was made from


def target_folder(given: str | None, key: str) -> Path | None:
    """The folder that a full model is to be written to, checked before anything is computed; None if none is given.

    Raises:
        ValueError: it exists and is not a full model of an earlier run.
    """
    if given is None:
        return None
    folder = Path(given)
    if folder.exists() and not (folder / CARD_FILE).is_file():
        raise ValueError(f"{key}: {folder} exists and is not a full model of an earlier run; choose another folder")
    return folder


def check_foldable(model: Any, modules: Iterable[str], key: str) -> None:
    """Check, before anything is computed, that updates of these modules can be folded into a causal LM.

    Args:
        model: may be without weights, on the device ``meta``.

    Raises:
        ValueError: the model is quantised, or a matrix is also that of another module, such as the embeddings.
    """
    if getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"{key}: the base model is quantised, so nothing can be folded into its weights; give the model that it was made from"
        )
    users: dict[Any, list[str]] = {}
    for name, part in model.named_modules():
        for weight in part.parameters(recurse=False):
            users.setdefault(weight, []).append(name)
    for module in modules:
        if others := [name for name in users[model.get_submodule(module).weight] if name != module]:
            raise ValueError(
                f"{key}: an adapter changes {module}, whose matrix the base model also uses as {others[0]}; without it in the "
                "adapter's target_modules it can be folded"
            )


def write_full_model(base: str | Path, adapter_folder: Path, out: Path, *, revision: str | None = None, **options: Any) -> str:
    """Write base model + adapter as safetensors with config and tokenizer; returns one line about the result.

    A sound folder of the same base and adapter is left as it is, a damaged one or one of others is replaced.

    Args:
        base: folder or hub id of the base model.
        adapter_folder: a PEFT folder.
        out: written atomically.
        options: of ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        FileNotFoundError: there is no such base model or adapter.
        ValueError: the adapter does not fit, the base model is quantised, or its output matrix is tied and adapted.
    """
    card = {"base": str(base), "base_identity": identity(base, revision), "adapter_sha256": adapter_fingerprint(adapter_folder)}
    if is_complete(out) and _is_sound(out) and read_object(out / CARD_FILE) == card:
        return f"full model: {out}, as written before"
    config, adapter = load_config(base, revision), read_adapter(adapter_folder)
    check_fit(adapter, adapter_folder, config)
    check_foldable(blank_model(config), adapter.modules, "full model")
    dtype = config.dtype or torch.float32
    model = load_causal_lm(base, revision=revision, dtype=dtype, device="cpu").model
    fold(model, adapter)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder, **options)
        _save_tokenizer(base, revision, folder)
        if (adapter_folder / MERGE_FILE).is_file():
            shutil.copyfile(adapter_folder / MERGE_FILE, folder / MERGE_FILE)
        (folder / CARD_FILE).write_text(json.dumps(card, indent=1))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return f"full model: {out} ({str(dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB)"


def _is_sound(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedError as error:
        logger.warning(f"{error.args[0].partition('; delete the folder')[0]}; it is written again")
        return False
    return True


@torch.no_grad()
def fold(model: Any, adapter: Adapter) -> None:
    """Add ``s B A`` to the weights of a causal LM, in fp32; see :func:`check_foldable`."""
    from transformers.pytorch_utils import Conv1D

    check_foldable(model, adapter.modules, f"adapter {adapter.name!r}")
    for module in adapter.modules:
        layer = model.get_submodule(module)
        a, b = adapter.factors(module)
        delta = (b @ a).T if isinstance(layer, Conv1D) else b @ a  # Conv1D stores [D_in, D_out]
        layer.weight.copy_(rounded(layer.weight.float() + delta, layer.weight.dtype))


def _save_tokenizer(base: str | Path, revision: str | None, folder: Path) -> None:
    """The base model's own tokenizer, without the pad token that :func:`load_causal_lm` may add."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(base), revision=revision, trust_remote_code=False).save_pretrained(folder)
