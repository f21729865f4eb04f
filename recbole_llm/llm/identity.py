"""What identifies the model in a folder, before anything of it is loaded."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
PATTERNS = ("config.json", *TOKENIZER, "chat_template*", "*.safetensors")
WHOLE_FILE = 64 * 2**20  # larger files are known by their header, their size and samples
SAMPLE, SAMPLES = 2**16, 64


def fingerprint(path: str | Path, revision: str | None = None) -> str:
    """What identifies a causal LM: SHA-256 of a folder's config, tokenizer, chat template and tensors, or ``id@revision``.

    A file above 64 MB counts with its size, its first 64 kB (where safetensors keep their header) and 63 samples.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    files = {file for pattern in PATTERNS for file in folder.glob(pattern)}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as handle:
            if size <= WHOLE_FILE:
                digest.update(handle.read())
                continue
            for sample in range(SAMPLES):
                handle.seek(max(size - SAMPLE, 0) * sample // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE))
    return digest.hexdigest()
