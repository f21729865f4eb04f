"""SBERT vectors of item texts, by any SentenceTransformer from a folder or the hub, frozen or fine-tuned.

From the hub, only JSON, tokenizer files and safetensors are downloaded; pickled weights and remote code are never read.
Vectors are cached on disk by the hash of their text, so that after a change of one title only that title is encoded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate, cycle
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recbole_llm.llm.identity import checked_hub_id, first_line, not_on_hub
from recbole_llm.llm.identity import fingerprint as part_fingerprint
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import DamagedError, fingerprint, load_state, save_state, sha256_file
from recbole_llm.store.locks import locked
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.trials import trial

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from recbole_llm.data.items import ItemTexts

logger = getLogger()

NAME = "text_encoder.json"  # the name that tables show, in the folder of the SentenceTransformer
READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # files to download from the hub


def item_sentences(items: ItemTexts, fields: Sequence[str]) -> list[str]:
    """The text of each item: its title and the values of the named columns, in one line.

    Raises:
        ValueError: a named column is absent.
    """
    sentences = []
    for title, known in zip(items.titles, items.known(fields), strict=True):
        within = f", {title}, "  # other columns replace a missing title, and are not repeated
        sentences.append(", ".join([title, *(text for text in known.values() if f", {text}, " not in within)]))
    return sentences


class TextEncoder:
    """Texts -> vectors [N, D], with gradients (:meth:`__call__`) or without (:meth:`encode`).

    Attributes:
        model: the SentenceTransformer, an ``nn.Module``, frozen until a caller trains it.
        name: as tables show it: ``builtin 0.2M``, a folder's name or a hub id.
        dim: D.
    """

    def __init__(self, model: SentenceTransformer, name: str, fingerprint: str):
        self.model, self.name = model, name
        self._loaded, self._loaded_bits = fingerprint, _bits(model)
        self._tokens: dict[str, dict[str, Any]] = {}
        with torch.no_grad():
            self.dim = self(["item"]).shape[1]

    @property
    def fingerprint(self) -> str:
        """Identifies the weights as they are now, also after training."""
        bits = _bits(self.model)
        return self._loaded if bits == self._loaded_bits else f"{self._loaded}+{bits:x}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors [N, D] in float32 on the model's device, differentiable. Tokens of texts are cached."""
        if not texts:
            return torch.zeros(0, self.dim, device=self.model.device)
        return self.model(self._features(texts))["sentence_embedding"].float()  # [N, D]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64, show_progress: bool = True) -> Tensor:
        """Vectors [N, D] in float32 on the CPU, in evaluation mode; equal texts are encoded once."""
        unique = sorted(dict.fromkeys(texts), key=len)
        vectors = torch.zeros(len(unique), self.dim)  # [U, D]
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with progress_bar("text encoder", len(unique), show=show_progress) as bar:
                for start in range(0, len(unique), batch_size):
                    batch = unique[start : start + batch_size]
                    vectors[start : start + len(batch)] = self(batch).cpu()
                    bar.advance(len(batch))
        finally:
            for module in training:
                module.training = True
        place = {text: row for row, text in enumerate(unique)}
        return vectors[[place[text] for text in texts]]  # [N, D]

    def save(self, folder: Path) -> None:
        """Write an ordinary SentenceTransformer folder in safetensors, and the name."""
        self.model.save(str(folder), create_model_card=False)
        (folder / NAME).write_text(json.dumps({"name": self.name}))

    def _features(self, texts: Sequence[str]) -> dict[str, Any]:
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            prompt = self.model.prompts.get(self.model.default_prompt_name or "")
            rows = _rows(self.model.preprocess(new, prompt=prompt))
            self._tokens.update(zip(new, rows, strict=True))
        features = _collate([self._tokens[text] for text in texts], self.model.tokenizer)
        return {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in features.items()}


def _bits(model: torch.nn.Module) -> int:
    """A checksum of the weights, equal on all devices."""
    return sum(int(p.detach().float().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters())


def _rows(features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each text's features without padding. Values that are not tensors, such as the modality, are equal for all texts."""
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    if "offsets" in tensors:  # StaticEmbedding concatenates texts
        for ids in torch.tensor_split(features["input_ids"], features["offsets"][1:].tolist()):
            yield {"input_ids": ids}  # [T]
    elif "attention_mask" in tensors and len({value.shape for value in tensors.values()}) == 1:  # all [N, T]
        for row, mask in enumerate(features["attention_mask"].bool()):
            yield {**features, **{key: value[row][mask] for key, value in tensors.items()}}  # [T]
    else:
        raise ValueError(
            f"text_encoder_path: a model that reads texts as {', '.join(features)} is not supported; its first "
            "module must be a Transformer or a StaticEmbedding"
        )


def _collate(rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The features of one batch, padded as the tokenizer does, or concatenated for a StaticEmbedding."""
    if "attention_mask" not in rows[0]:
        offsets = [0, *accumulate(len(row["input_ids"]) for row in rows)][:-1]
        return {"input_ids": torch.cat([row["input_ids"] for row in rows]), "offsets": torch.tensor(offsets)}  # [N T], [N]
    features = dict(rows[0])
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    for key in (key for key, value in rows[0].items() if isinstance(value, Tensor)):
        features[key] = pad_sequence([row[key] for row in rows], True, padding.get(key, 0), tokenizer.padding_side)  # [N, T]
    return features


# -- loading -----------------------------------------------------------------------------------------------------------


def load_text_encoder(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """Load a SentenceTransformer, frozen and in evaluation mode.

    Args:
        path: a folder that ``SentenceTransformer.save`` wrote, or a hub id.
        revision: branch, tag or commit of the hub.
        device: CUDA by default if available.
        name: as tables show it; by default that of the folder or the hub id.
        dtype: float32 for an encoder that will be trained.

    Raises:
        FileNotFoundError: nothing can be loaded from ``path``.
        ValueError: a model without token inputs.
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    hide_progress_bars()
    folder, identity = _located(path, revision)
    name = name or (folder.resolve().name if Path(path).expanduser().is_dir() else str(path))
    for file in folder.rglob("*_model.bin"):
        if not any(file.parent.glob(file.stem.removeprefix("pytorch_") + "*.safetensors")):
            raise _incomplete(folder, f"{file.relative_to(folder)} has no safetensors beside it")
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _incomplete(folder, first_line(error)) from error
    if (folder / NAME).is_file():
        name = json.loads((folder / NAME).read_text())["name"]
    return TextEncoder(
        model.to(dtype).requires_grad_(False).eval(), name, identity if dtype == torch.float32 else f"{identity} {dtype}"
    )


def identity(path: str | Path, revision: str | None = None) -> str:
    """The identity of a text encoder, without loading it: a hash of its folder, or ``id@commit`` of the hub."""
    return _located(path, revision)[1]


def _located(path: str | Path, revision: str | None) -> tuple[Path, str]:
    """The folder of a text encoder, downloaded if necessary, and its identity."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, _folder_fingerprint(folder)
    example = "sentence-transformers/all-MiniLM-L6-v2"
    source = checked_hub_id(path, "text_encoder_path", "modules.json and model.safetensors", example)
    from huggingface_hub import snapshot_download

    if "/" not in source:
        source = f"sentence-transformers/{source}"  # as in the library sentence-transformers
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    try:
        folder = Path(snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=READ))
    except (OSError, ValueError) as error:
        raise not_on_hub("text_encoder_path", source, revision, error) from error
    return folder, f"{path}@{folder.name}"  # the hub's snapshots are named after their commit


def _folder_fingerprint(folder: Path) -> str:
    """SHA-256 of everything that determines the vectors: all configs, tensors and tokenizer files."""
    parts = sorted({file.parent for pattern in ("config.json", "*.safetensors") for file in folder.rglob(pattern)})
    found = sorted(folder.glob("*config*.json")) + sorted(folder.glob("*/**/*config*.json"))
    # within a module, the fingerprint of its part has config.json and tokenizer_config.json already
    own = [file for file in found if file.parent == folder or file.name not in ("config.json", "tokenizer_config.json")]
    settings = [file for file in (folder / "modules.json", *own) if file.is_file()]
    return fingerprint(
        [
            [(part.relative_to(folder).as_posix(), part_fingerprint(part)) for part in parts],
            [(file.relative_to(folder).as_posix(), sha256_file(file)) for file in settings],
        ]
    )


def _incomplete(folder: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"text_encoder_path: the folder {folder} holds no complete model ({reason}). It needs modules.json, the modules' configs "
        "and *.safetensors; pickled weights (*.bin) and code are not read: convert them with SentenceTransformer.save(), or use "
        "text_encoder_path: builtin"
    )


def encoding_seconds(encoder: TextEncoder, texts: Sequence[str], *, batch_size: int = 64) -> float:
    """The seconds that :meth:`TextEncoder.encode` takes, by a trial of some of its batches."""
    unique = sorted(dict.fromkeys(texts), key=len)
    batches = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
    order = np.random.default_rng(0).permutation(len(batches))
    following = cycle(batches[i] for i in order)
    return trial(lambda: encoder.encode(next(following), show_progress=False), len(batches))


# -- vectors on disk ---------------------------------------------------------------------------------------------------


def cached_vectors(encoder: TextEncoder, texts: Sequence[str], folder: Path, *, show_progress: bool = True) -> Tensor:
    """The texts' vectors [N, D], cached under ``folder`` by encoder and text."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder / fingerprint([encoder.fingerprint, code_fingerprint(__name__)])[:12]
    keys = [sha256(text.encode()).hexdigest() for text in texts]
    with locked(cache, "text vectors"):
        for leftover in folder.glob(f".{cache.name}.*tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        place, vectors = _read_vectors(cache, encoder.dim)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in place}
        if missing:
            new = encoder.encode(list(missing.values()), show_progress=show_progress)
            vectors = torch.cat([vectors, new])  # [M, D]
            place |= {key: len(place) + row for row, key in enumerate(missing)}
            save_state(cache, {"vectors": vectors}, {"texts": list(place)})
    return vectors[[place[key] for key in keys]]  # [N, D]


def _read_vectors(cache: Path, dim: int) -> tuple[dict[str, int], Tensor]:
    """Row by text hash, and the rows [M, D]; empty if the cache is missing or damaged."""
    if cache.is_dir():
        try:
            tensors, values = load_state(cache)
            return {key: row for row, key in enumerate(values["texts"])}, tensors["vectors"]
        except DamagedError as error:
            logger.warning(f"{error}; encoding its texts again")
    return {}, torch.zeros(0, dim)
