"""What identifies a model before it is loaded, and the errors of a model that cannot be loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
# transformers reads additional_chat_templates/default.jinja as the chat template
PATTERNS = ("config.json", *TOKENIZER, "chat_template*", "additional_chat_templates/*", "*.safetensors")
WHOLE_FILE = 64 * 2**20  # larger files are hashed by size and samples
SAMPLE, SAMPLES = 2**16, 64  # of a file
TENSOR_SAMPLE = 2**12  # of each tensor in it
LONGEST_HEADER = 100 * 10**6  # of safetensors


def fingerprint(path: str | Path, revision: str | None = None) -> str:
    """SHA-256 of a folder's config, tokenizer, chat template and tensors; ``id@revision`` for a hub id.

    Of a file above 64 MB, the hash reads the size, the first 64 kB, 63 further samples and 4 kB in the middle of each tensor.

    Raises:
        FileNotFoundError: one of them is a broken link, a pipe or a device.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted({file for pattern in PATTERNS for file in folder.glob(pattern)}):
        if file.is_dir():
            continue
        if not file.is_file():  # a pipe would wait for its writer, and a device may have no end
            raise FileNotFoundError(f"{file} is a broken link, a pipe or a device, not a file; put the file in its place")
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
        with file.open("rb") as handle:
            if size <= WHOLE_FILE:
                digest.update(handle.read())
                continue
            spread = ((max(size - SAMPLE, 0) * sample // (SAMPLES - 1), SAMPLE) for sample in range(SAMPLES))
            for place, length in (*spread, *_in_tensors(handle)):
                handle.seek(place)
                digest.update(handle.read(length))
    return digest.hexdigest()


def _in_tensors(handle: BinaryIO) -> Iterator[tuple[int, int]]:
    """Place and length of a sample in the middle of each tensor of a safetensors file, since a training may change a few alone.

    A file without such a header has none; whoever loads it says what is wrong.
    """
    handle.seek(0)
    length = int.from_bytes(handle.read(8), "little")
    try:
        header = json.loads(handle.read(min(length, LONGEST_HEADER)))
        ends = [entry["data_offsets"] for name, entry in sorted(header.items()) if name != "__metadata__"]
        for start, end in ends:
            taken = min(TENSOR_SAMPLE, end - start)
            yield 8 + length + (start + end - taken) // 2, taken
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def checked_hub_id(path: str | Path, key: str, files: str, example: str) -> str:
    """``path`` if it can be a hub id.

    Raises:
        FileNotFoundError: it cannot, so it is a folder that does not exist. ``files`` and ``example`` are for the message.
    """
    if isinstance(path, Path) or not HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"{key}: there is no folder {path}; give a folder with {files}, a hub id such as {example}, or 'builtin'"
        )
    return path


def not_on_hub(key: str, hub_id: str, revision: str | None, error: Exception) -> FileNotFoundError:
    """The error for a hub id that cannot be loaded: what was tried, the reason, the remedy."""
    wanted = f"{hub_id}@{revision}" if revision else hub_id
    return FileNotFoundError(
        f"{key}: cannot load {wanted} ({first_line(error)}). Tried the folder of that name, the local cache (HF_HOME) and the "
        f"hub. On a machine with network access, run `hf download {hub_id}` and point HF_HOME or {key} to the result; "
        f"or use {key}: builtin, which needs no download"
    )


def check_complete(loading: Mapping[str, Collection[str]]) -> None:
    """Check the loading info of ``transformers``, which gives random values to a weight that no file has.

    Raises:
        OSError: a weight is missing, or has another shape than the config says.
    """
    odd = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if odd:
        raise OSError(f"its files do not fit its config: {len(odd)} weights are missing or of another shape, such as {odd[0]}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
