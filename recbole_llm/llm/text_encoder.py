"""SBERT vectors of item texts: any SentenceTransformer by folder or hub id, frozen or fine-tuned, or the builtin encoder.

A hub id is first brought to a folder of JSON and safetensors; pickled weights and remote code are never read. Vectors are
kept on disk by the hash of their text, so that a catalogue in which one title changed has one text to encode.

The builtin encoder (``llm/builtin_text_encoder.py``) is an ordinary SentenceTransformer, so that the code that runs MiniLM
runs it and trains it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recbole_llm.llm.identity import HUB_ID
from recbole_llm.llm.identity import fingerprint as part_fingerprint
from recbole_llm.logs import hide_progress_bars
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import DamagedError, fingerprint, load_state, save_state, sha256_file
from recbole_llm.store.progress import progress_bar

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from recbole_llm.data.items import ItemTexts

logger = getLogger()

NAME = "text_encoder.json"  # keeps the name that tables show, beside the SentenceTransformer's own files
READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # what is fetched from the hub


def item_sentences(items: ItemTexts, fields: Sequence[str]) -> list[str]:
    """What is encoded of each item: its title, then the named columns where they have a value, in one line.

    Raises:
        ValueError: a named column is absent.
    """
    sentences = []
    for title, known in zip(items.titles, items.known(fields), strict=True):
        said = title.split(", ")  # of an item without a title, other columns stand in for it
        sentences.append(", ".join([title, *(text for text in known.values() if text not in said)]))
    return sentences


class TextEncoder:
    """Texts -> vectors [N, D], with gradients (calling it) or without (:meth:`encode`).

    Attributes:
        model: the SentenceTransformer, an ``nn.Module``, frozen until a caller trains it.
        name: what tables show: ``builtin 0.2M``, a folder's name or a hub id.
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
        """What identifies the weights: as loaded, or, since they were trained, as they are now."""
        bits = _bits(self.model)
        return self._loaded if bits == self._loaded_bits else f"{self._loaded}+{bits:x}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors [N, D] in float32 on the model's device, differentiable. A text is tokenised the first time only."""
        if not texts:
            return torch.zeros(0, self.dim, device=self.model.device)
        return self.model(self._features(texts))["sentence_embedding"].float()  # [N, D]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64, show_progress: bool = True) -> Tensor:
        """Vectors [N, D] in float32 on the CPU, in evaluation mode; equal texts are encoded once, like lengths together."""
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
        """Write an ordinary SentenceTransformer folder in safetensors; it is loaded again under the same name."""
        self.model.save(str(folder), create_model_card=False)
        (Path(folder) / NAME).write_text(json.dumps({"name": self.name}))

    def _features(self, texts: Sequence[str]) -> dict[str, Any]:
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            prompt = self.model.prompts.get(self.model.default_prompt_name or "")
            rows = _rows(self.model.preprocess(new, prompt=prompt))
            self._tokens.update(zip(new, rows, strict=True))
        features = _collate([self._tokens[text] for text in texts], self.model.tokenizer)
        return {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in features.items()}


def _bits(model: torch.nn.Module) -> int:
    """The sum of all weights' bits: the same on every device, another one after training."""
    return sum(int(p.detach().float().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters())


def _rows(features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each text's features without padding. What is no tensor, such as the modality, is the same for all texts."""
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    if "offsets" in tensors:  # StaticEmbedding lays texts end to end
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
    """The features of one batch, padded as the tokenizer pads, or laid end to end for a StaticEmbedding."""
    if "attention_mask" not in rows[0]:
        offsets = [0, *accumulate(len(row["input_ids"]) for row in rows)][:-1]
        return {"input_ids": torch.cat([row["input_ids"] for row in rows]), "offsets": torch.tensor(offsets)}  # [N T], [N]
    features = dict(rows[0])
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    for key in (key for key, value in rows[0].items() if isinstance(value, Tensor)):
        features[key] = pad_sequence([row[key] for row in rows], True, padding.get(key, 0), tokenizer.padding_side)  # [N, T]
    return features


# -- loading -----------------------------------------------------------------------------------------------------------


def load_text_encoder(path: str | Path, *, revision: str | None = None, device: str | torch.device | None = None) -> TextEncoder:
    """Load a SentenceTransformer in float32, frozen and in evaluation mode.

    path: a folder that ``SentenceTransformer.save`` wrote, or a hub id. revision: branch, tag or commit of the hub.
    device: default CUDA where there is one.
    Raises FileNotFoundError where nothing can be loaded from `path`, ValueError for a model that reads no tokens.
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    hide_progress_bars()
    folder, identity = _located(path, revision)
    name = folder.resolve().name if Path(path).expanduser().is_dir() else str(path)
    for file in folder.rglob("*_model.bin"):
        if not any(file.parent.glob(file.stem.removeprefix("pytorch_") + "*.safetensors")):
            raise FileNotFoundError(_incomplete(folder, f"{file.relative_to(folder)} has no safetensors beside it"))
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise FileNotFoundError(_incomplete(folder, _first_line(error))) from error
    if (folder / NAME).is_file():
        name = json.loads((folder / NAME).read_text())["name"]
    return TextEncoder(model.float().requires_grad_(False).eval(), name, identity)


def identity(path: str | Path, revision: str | None = None) -> str:
    """What identifies a text encoder before it is loaded: a hash of its folder, or ``id@commit`` of the hub."""
    return _located(path, revision)[1]


def _located(path: str | Path, revision: str | None) -> tuple[Path, str]:
    """The folder of a text encoder, fetched where need be, and what identifies it."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, _folder_fingerprint(folder)
    folder = _fetch(path, revision)
    return folder, f"{path}@{folder.name}"  # the hub's snapshots are named after their commit


def _fetch(path: str | Path, revision: str | None) -> Path:
    """The folder of a hub id in the local cache, downloaded where need be; a path that is neither stays off the network."""
    if isinstance(path, Path) or not HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"text_encoder_path: there is no folder {path}; give a folder with modules.json and "
            "model.safetensors, a hub id such as sentence-transformers/all-MiniLM-L6-v2, or 'builtin'"
        )
    from huggingface_hub import snapshot_download

    source = path if "/" in path else f"sentence-transformers/{path}"  # as sentence-transformers itself reads it
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=READ))
    except (OSError, ValueError) as error:
        wanted = f"{source}@{revision}" if revision else source
        raise FileNotFoundError(
            f"text_encoder_path: cannot load {wanted} ({_first_line(error)}). Tried the folder of that name, the local cache "
            f"(HF_HOME) and the hub. Download it where there is a network, `hf download {source}`, and point "
            "HF_HOME or text_encoder_path to it; or use text_encoder_path: builtin, which needs no download"
        ) from error


def _folder_fingerprint(folder: Path) -> str:
    """SHA-256 of what determines the vectors: every module's config and tensors, the tokenizer, how they are put together."""
    parts = sorted({file.parent for pattern in ("config.json", "*.safetensors") for file in folder.rglob(pattern)})
    settings = [file for file in (folder / "modules.json", *sorted(folder.glob("*config*.json"))) if file.is_file()]
    return fingerprint(
        [
            [(part.relative_to(folder).as_posix(), part_fingerprint(part)) for part in parts],
            [(file.name, sha256_file(file)) for file in settings],
        ]
    )


def _incomplete(folder: Path, reason: str) -> str:
    return (
        f"text_encoder_path: the folder {folder} holds no complete model ({reason}). It needs modules.json, the modules' "
        "configs and *.safetensors; pickled weights (*.bin) and code are not read: SentenceTransformer.save() converts; "
        "text_encoder_path: builtin needs no model"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- vectors on disk ---------------------------------------------------------------------------------------------------


def cached_vectors(encoder: TextEncoder, texts: Sequence[str], folder: Path, *, show_progress: bool = True) -> Tensor:
    """The texts' vectors [N, D], kept under ``folder`` by encoder and text; only texts that are not there are encoded."""
    folder.mkdir(parents=True, exist_ok=True)
    # hashed: what hub ids begin with is their owner
    kept = folder / fingerprint([encoder.fingerprint, code_fingerprint(__name__)])[:12]
    keys = [sha256(text.encode()).hexdigest() for text in texts]
    # of two runs with the same encoder, one encodes and one waits; a killed process holds no lock
    with FileLock(kept.with_name(f".{kept.name}.lock")):
        for leftover in folder.glob(f".{kept.name}.*tmp"):  # of a process killed while it wrote
            shutil.rmtree(leftover)
        place, vectors = _kept_vectors(kept, encoder.dim)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in place}
        if missing:
            new = encoder.encode(list(missing.values()), show_progress=show_progress)
            vectors = torch.cat([vectors, new])  # [M, D]
            place |= {key: len(place) + row for row, key in enumerate(missing)}
            save_state(kept, {"vectors": vectors}, {"texts": list(place)})
    return vectors[[place[key] for key in keys]]  # [N, D]


def _kept_vectors(kept: Path, dim: int) -> tuple[dict[str, int], Tensor]:
    """Row by text hash, and the rows [M, D]; empty where nothing is kept, or something damaged."""
    if kept.is_dir():
        try:
            tensors, values = load_state(kept)
            return {key: row for row, key in enumerate(values["texts"])}, tensors["vectors"]
        except DamagedError as error:
            logger.warning(f"{error}; its vectors are encoded again now")
    return {}, torch.zeros(0, dim)
