"""The text encoder of a model: the builtin one, or any SentenceTransformer from a folder, a package or the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.llm.builtin_text_encoder import builtin_stage
from recbole_llm.llm.causal_lm import resolved_dtype
from recbole_llm.llm.packages import distribution_of, is_package, located
from recbole_llm.llm.text_encoder import NAME, TextEncoder, cached_vectors, encoding_seconds, identity, load_text_encoder
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Folders

BUILTIN = "builtin"


class TextBackbone:
    """The text encoder that ``text_encoder_path`` names, for the sentences of a catalogue.

    Args:
        trained: the caller trains it, so it is in float32; otherwise its dtype is ``dtype: auto`` of the device.

    Attributes:
        sentences: the text of each of I items; item 0 is padding.
        stages: the stage that makes the builtin encoder; empty for any other.
        name: as tables show it; the builtin encoder's size is part of it once it is loaded.
    """

    def __init__(self, config: Any, sentences: Sequence[str], *, trained: bool = False):
        self.sentences = sentences
        self._path, self._revision = config["text_encoder_path"], config["text_encoder_revision"]
        self._device, self._show_progress = config["device"], config["show_progress"]
        self._dtype = torch.float32 if trained else resolved_dtype("auto", torch.device(self._device))
        self._vectors_folder = Path(config["checkpoint_dir"]) / "text_vectors"
        builtin = self._path == BUILTIN
        self._builtin = config["builtin_text_encoder"]
        self.stages = (builtin_stage(sentences, **self._builtin, seed=config["seed"]),) if builtin else ()
        self.name = distribution_of(self._path) if is_package(self._path) else self._name_of(Path(self._path).expanduser())

    @cached_property
    def _source(self) -> Path | str:
        """The folder or hub id to load."""
        return located(self._path, "text_encoder_path") if is_package(self._path) else self._path

    @cached_property
    def identity(self) -> str:
        """``id@commit`` of an encoder from the hub, otherwise a hash of its folder or of the stage that trains it."""
        return self.stages[0].fingerprint if self.stages else identity(self._source, self._revision)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder, its precision and the sentences; does not load the encoder."""
        return fingerprint([self.identity, str(self._dtype), list(self.sentences)])

    @property
    def builtin(self) -> tuple[str, ...]:
        """``text_encoder`` if it is the builtin one, which is not pretrained."""
        return ("text_encoder",) if self.stages else ()

    def _name_of(self, folder: Path) -> str:
        """The name of an encoder from a folder or the hub, as :func:`load_text_encoder` gives it."""
        if not self.stages and (folder / NAME).is_file():
            return str(json.loads((folder / NAME).read_text())["name"])
        return folder.resolve().name if folder.is_dir() and not self.stages else str(self._path)

    def read_name(self, results: Folders) -> None:
        """Set :attr:`name` to that of the encoder that the stage has made, without loading it."""
        if self.stages:
            self.name = json.loads((results.folder(self.stages[0]) / NAME).read_text())["name"]

    def load(self, results: Folders | None = None) -> TextEncoder:
        """The encoder, frozen and in ``eval()``; loaded anew at each call, since callers may train it.

        Args:
            results: the results of :attr:`stages`; not needed if there are none.
        """
        path = results.folder(self.stages[0]) if self.stages and results else self._source
        name = self.name if is_package(self._path) else None
        encoder = load_text_encoder(path, revision=self._revision, device=self._device, name=name, dtype=self._dtype)
        self.name = encoder.name
        return encoder

    def trial(self) -> tuple[int, float]:
        """The width T of the vectors, and the seconds that :meth:`vectors` takes if none is cached.

        The builtin encoder, which may not be trained yet, is a table, so it takes no time.
        """
        if self.stages:
            return self._builtin["dim"], 0.0
        encoder = self.load()
        return encoder.dim, encoding_seconds(encoder, self.sentences[1:])

    def vectors(self, encoder: TextEncoder) -> Tensor:
        """Vectors [I, T] of the sentences, cached by encoder and text; row 0 is zero."""
        found = cached_vectors(encoder, self.sentences[1:], self._vectors_folder, show_progress=self._show_progress)
        return torch.cat([torch.zeros(1, encoder.dim), found])  # [I, T]
