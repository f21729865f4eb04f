"""The backbone of a model: the builtin LM, or any causal LM from a folder, a GGUF file, a package or the hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recbole_llm.llm.causal_lm import CausalLM, identity, load_causal_lm, load_tokenizer, resolved_dtype
from recbole_llm.llm.gguf_file import dequantised, gguf_name, is_gguf
from recbole_llm.llm.packages import distribution_of, is_package, located
from recbole_llm.settings import Settings
from recbole_llm.store.files import fingerprint, preserved_random_state
from recbole_llm.store.stages import Folders, Stage

BUILTIN = "builtin"


@dataclass(frozen=True)
class BackboneSettings(Settings):
    """Which causal LM, and the options of ``transformers`` to load it with.

    Attributes:
        path: ``builtin``, a folder, a GGUF file, ``package:DISTRIBUTION/PATH`` or a hub id.
        saved: where the dequantised weights of a GGUF file are written.
    """

    KEYS = {"path": "llm_path", "revision": "llm_revision", "saved": "checkpoint_dir"}

    path: str
    revision: str | None
    dtype: str
    device: str
    device_map: Any
    attn_implementation: str | None
    load_in_4bit: bool
    max_memory: Any = None
    saved: str = "saved"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights, with ``auto`` resolved."""
        return resolved_dtype(self.dtype, torch.device(self.device))


class Backbone:
    """A frozen causal LM with its tokenizer.

    Attributes:
        stages: the stage that trains the builtin LM; empty for any other.
    """

    def __init__(self, settings: BackboneSettings, stage: Stage | None = None, folder: Path | None = None):
        self._settings, self._stage, self._folder = settings, stage, folder
        self._loaded: CausalLM | None = None
        self.stages = (stage,) if stage else ()

    @cached_property
    def _named(self) -> Path | str:
        """What ``llm_path`` names: a folder or file on disk, or a hub id."""
        path = self._folder or self._settings.path
        return located(str(path), "llm_path") if is_package(path) else path

    @cached_property
    def _source(self) -> Path | str:
        """The folder or hub id to load; a GGUF file is dequantised into a folder at the first call."""
        if not is_gguf(self._named):
            return self._named
        return dequantised(Path(self._named).expanduser(), self._settings.torch_dtype, Path(self._settings.saved) / "llm")

    @cached_property
    def identity(self) -> str:
        """``id@commit`` of a model from the hub, otherwise a hash of its folder or of the stage that trains it."""
        return self._stage.fingerprint if self._stage else identity(self._source, self._settings.revision)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer, chat template, precision and quantisation; needs neither loading nor training."""
        return fingerprint([self.identity, str(self._settings.torch_dtype), self._settings.load_in_4bit])

    @property
    def name(self) -> str:
        """As tables show it: a folder's or a GGUF file's name, a hub id, or ``builtin`` with its size once it is loaded."""
        path = self._settings.path
        if path != BUILTIN:
            if is_gguf(path):
                return gguf_name(Path(path))
            folder = Path(path).expanduser()
            return distribution_of(path) if is_package(path) else folder.resolve().name if folder.is_dir() else path
        if self._loaded is None:
            return BUILTIN
        return f"{BUILTIN} {sum(p.numel() for p in self._loaded.model.parameters()) / 1e6:.1f}M"

    @property
    def builtin(self) -> tuple[str, ...]:
        """``llm`` if it is the builtin LM, which is not pretrained."""
        return ("llm",) if self._settings.path == BUILTIN else ()

    def load(self, results: Folders) -> CausalLM:
        """The LM, frozen and in ``eval()``, on its device; loaded once. Random states are preserved."""
        if self._loaded is None:
            source = results.folder(self._stage) if self._stage else self._source
            options = {key: value for key, value in asdict(self._settings).items() if key not in ("path", "saved")}
            with preserved_random_state():
                self._loaded = load_causal_lm(source, **options)
        return self._loaded

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, to check settings against before training; None if the stage has yet to train it."""
        return None if self._stage else load_tokenizer(self._source, self._settings.revision)
