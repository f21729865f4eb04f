"""Causal LMs in GGUF files, as llama.cpp reads them.

``transformers`` reads the architecture, the tokenizer with its chat template, and the weights, which it dequantises. This is slow
and needs the package ``gguf``, so it is done once: the result is an ordinary folder of safetensors, named by the file's hash. Its
weights are in float32, in which every value of a block is exact, whatever dtype a run loads them in: runs in another one
have the same base model.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.identity import check_complete, first_line
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import DamagedError, atomic_folder, fingerprint, is_complete, sha256_file, verify
from recbole_llm.store.locks import locked

logger = getLogger()

SOURCE = "gguf.json"  # file name and SHA-256, in the folder of the dequantised weights
_QUANTISATION = re.compile(r"[.-]((?:I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F16|F32))$", re.IGNORECASE)


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).lower().endswith(".gguf")


def gguf_name(file: Path) -> str:
    """The name that tables show: ``SmolLM2-135M-Instruct Q4_1`` for ``SmolLM2-135M-Instruct.Q4_1.gguf``."""
    return _QUANTISATION.sub(r" \1", file.stem)


def dequantised(file: Path, root: Path) -> Path:
    """A folder in the ``save_pretrained`` layout with the dequantised weights and the tokenizer, written once under ``root``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package ``gguf`` is missing.
        ValueError: the file is damaged, or of a family that ``transformers`` does not read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"llm_path: there is no file {file}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"llm_path: {file.name} is read with the package gguf; run `pip install gguf`")
    sha = sha256_file(file)
    made_by = [sha, code_fingerprint(__name__), version("transformers"), version("gguf")]
    folder = root / f"{file.stem}-{fingerprint(made_by)[:12]}"
    with locked(folder, "llm_path"):
        for leftover in root.glob(f".{folder.name}.*tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        if not _is_whole(folder):
            logger.info(f"dequantising {file.name} into {folder}, once")
            with atomic_folder(folder) as out:
                _convert(file, out)
                (out / SOURCE).write_text(json.dumps({"file": file.name, "sha256": sha}))
    return folder


def _is_whole(folder: Path) -> bool:
    if not is_complete(folder):
        return False
    try:
        verify(folder)
    except DamagedError as error:
        logger.warning(f"{error}; it is dequantised again")
        return False
    return True


def _convert(file: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    hide_progress_bars()
    auto: Any = AutoModelForCausalLM  # its return type does not know output_loading_info
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with redirect_stderr(StringIO()):  # a progress bar of transformers that has no switch
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
            options |= {"dtype": torch.float32, "output_loading_info": True}
            options["quantization_config"] = GgufConfig(dequantize=True)  # else blocks stay packed where the package kernels is
            model, loading = auto.from_pretrained(str(file.parent), **options)
        check_complete(loading)
    except Exception as error:  # gguf and transformers raise many kinds for a damaged file
        raise ValueError(
            f"llm_path: {file} cannot be read ({first_line(error)}). It must be a whole GGUF file of a family that transformers "
            "reads (Llama, Qwen2, Mistral, Gemma, Phi-3, ...); download it again, or give a folder of safetensors"
        ) from error
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
