"""The backbone of a model: the builtin LM, or any causal LM from a folder, a GGUF file, a package or the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from recbole_llm import compat
from recbole_llm.llm.causal_lm import (
    CausalLM,
    check_bitsandbytes,
    check_weights,
    identity,
    load_causal_lm,
    load_config,
    load_tokenizer,
    resolved_dtype,
)
from recbole_llm.llm.counting import count_passes
from recbole_llm.llm.gguf_file import dequantised, gguf_name, is_gguf
from recbole_llm.llm.memory import check_max_memory
from recbole_llm.llm.packages import distribution_of, is_package, located
from recbole_llm.llm.reading import Reading
from recbole_llm.settings import Settings
from recbole_llm.store.files import fingerprint
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Folders, Stage

BUILTIN = "builtin"
_NOT_OF_LOADING = ("path", "saved", "float32_matmul_precision")
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}  # module and distribution


class Check(Protocol):
    """Finds out how the LM of a fingerprint is run, and may know it already."""

    def __call__(self, identity: str, name: str, load: Callable[[], CausalLM], /) -> Reading: ...

    def known(self, identity: str, /) -> Reading | None: ...


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
    float32_matmul_precision: str = "highest"
    saved: str = "saved"
    fsdp: bool = False

    def check(self) -> None:
        """Raise a ValueError or an ImportError for options that this machine cannot load an LM with."""
        _ = self.torch_dtype
        check_max_memory(self.max_memory)
        if self.fsdp and (self.load_in_4bit or self.device_map):
            other = "load_in_4bit: True" if self.load_in_4bit else f"device_map: {self.device_map}"
            raise ValueError(f"fsdp: True (or accelerate launch --use_fsdp) excludes {other}; give one of them")
        if self.load_in_4bit:
            check_bitsandbytes()
        if package := _ATTENTION_PACKAGES.get(str(self.attn_implementation)):
            if torch.device(self.device).type == "cpu":
                raise ValueError(f"attn_implementation: {self.attn_implementation} needs an accelerator; choose sdpa or eager")
            if importlib.util.find_spec(package[0]) is None:
                raise ImportError(
                    f"attn_implementation: {self.attn_implementation} needs {package[1]}: `pip install {package[1]}`, or sdpa"
                )

    @property
    def precision(self) -> list[Any]:
        """What determines the rounding of results: the dtype, the quantisation, and TF32 for float32 on an accelerator."""
        products = self.float32_matmul_precision if torch.device(self.device).type == "cuda" else "highest"
        return [str(self.torch_dtype), self.load_in_4bit, products]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights, with ``auto`` resolved."""
        return resolved_dtype(self.dtype, torch.device(self.device))


@dataclass(frozen=True)
class Outline:
    """What a causal LM is without its weights, and how it is loaded.

    Attributes:
        config: of ``transformers``.
        reading: how it is run, if that is known.
        loaded: its weights are in memory.
        shards: over how many processes its layers are spread.
    """

    config: Any
    tokenizer: Any
    dtype: torch.dtype
    device: str
    load_in_4bit: bool
    reading: Reading = Reading()
    loaded: bool = False
    shards: int = 1


class Backbone:
    """A frozen causal LM with its tokenizer.

    Args:
        check: finds out how the LM is run exactly, see :class:`~recbole_llm.llm.checks.BackboneCheck`.
        untrained: configuration and tokenizer of an LM that ``stage`` trains.

    Attributes:
        stages: the stage that trains the builtin LM; empty for any other.
    """

    def __init__(
        self,
        settings: BackboneSettings,
        stage: Stage | None = None,
        folder: Path | None = None,
        check: Check | None = None,
        untrained: Callable[[], tuple[Any, Any]] | None = None,
    ):
        self._settings, self._stage, self._folder = settings, stage, folder
        self._check, self._untrained = check, untrained
        self._reading: Reading | None = None
        self._unchecked: CausalLM | None = None
        self._loaded: CausalLM | None = None
        self._size = 0
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
        return dequantised(Path(self._named).expanduser(), Path(self._settings.saved) / "llm")

    @cached_property
    def identity(self) -> str:
        """``id@commit`` of a model from the hub, otherwise a hash of its folder or of the stage that trains it."""
        return self._stage.fingerprint if self._stage else identity(self._source, self._settings.revision)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer, chat template, precision and quantisation; needs neither loading nor training."""
        return fingerprint([self.identity, *self._settings.precision])

    @property
    def name(self) -> str:
        """As tables show it: a folder's or a GGUF file's name, a hub id, or ``builtin`` with its size once it is loaded."""
        path = self._settings.path
        if path != BUILTIN:
            if is_gguf(path):
                return gguf_name(Path(path))
            folder = Path(path).expanduser()
            return distribution_of(path) if is_package(path) else folder.resolve().name if folder.is_dir() else path
        return BUILTIN if self._loaded is None else f"{BUILTIN} {self._size / 1e6:.1f}M"

    @property
    def base_name(self) -> str:
        """The base model that adapters of this LM name: a hub id or a folder."""
        if self._stage:
            return self._stage.folder_name
        folder = Path(self._source).expanduser()
        return str(folder.resolve() if folder.is_dir() else self._source)

    def source(self, results: Folders) -> str | Path:
        """The folder or hub id to load it from."""
        return results.folder(self._stage) if self._stage else self._source

    @property
    def revision(self) -> str | None:
        """The revision of a hub id."""
        return self._settings.revision

    @property
    def builtin(self) -> tuple[str, ...]:
        """``llm`` if it is the builtin LM, which is not pretrained."""
        return ("llm",) if self._settings.path == BUILTIN else ()

    def load(self, results: Folders) -> CausalLM:
        """The LM, frozen and in ``eval()``, on its device; loaded once. Random states are preserved."""
        if self._loaded is None:
            causal = self._load(self.source(results))
            self._loaded = replace(causal, reading=self._exact(lambda: causal))
            self._size = causal.model.num_parameters()  # before any adapter is beside them
            count_passes(causal.model)  # the passes of the check are no part of a plan
        return self._loaded

    def check_loadable(self) -> None:
        """Refuse options that this machine cannot load an LM with, and an LM without weights that are read; a plan needs neither.

        Raises:
            ValueError, ImportError, FileNotFoundError: names the key and the remedy.
        """
        self._settings.check()
        if self._stage is None:
            check_weights(self._source, self._settings.revision)

    def check(self, longest: int) -> None:
        """Refuse an LM that cannot be run exactly, or not on rows of ``longest`` tokens.

        The builtin LM is checked when it is loaded, after it was trained.

        Raises:
            ValueError: names the key and the remedy.
        """
        if self._stage is not None:
            return
        context = self._exact(lambda: self._load(self._source)).context
        if context and longest > context:
            raise ValueError(
                f"max_prompt_tokens: prompts and answers of this run have up to {longest} tokens, more than the context of "
                f"{self.name}, {context}; lower max_prompt_tokens by {longest - context}, or max_history"
            )

    def _load(self, source: str | Path) -> CausalLM:
        if self._unchecked is None:
            options = {key: value for key, value in asdict(self._settings).items() if key not in _NOT_OF_LOADING}
            with preserved_random_state():
                self._unchecked = load_causal_lm(source, **options)
        return self._unchecked

    def _exact(self, load: Callable[[], CausalLM]) -> Reading:
        if self._reading is None:
            self._reading = self._check(self.fingerprint, self.name, load) if self._check else Reading()
        return self._reading

    @property
    def outline(self) -> Outline:
        """The LM without its weights, which are not read; of the builtin LM, the tokenizer is trained if necessary."""
        settings = self._settings
        return Outline(
            *self._described,
            settings.torch_dtype,
            str(settings.device),
            settings.load_in_4bit,
            self._reading or (self._check and self._check.known(self.fingerprint)) or Reading(),
            loaded=self._unchecked is not None,
            shards=compat.launched()[1] if settings.fsdp else 1,
        )

    @cached_property
    def _described(self) -> tuple[Any, Any]:
        if self._untrained is not None:
            return self._untrained()
        return load_config(self._source, self._settings.revision), load_tokenizer(self._source, self._settings.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, to check settings against before training; None if the stage has yet to train it."""
        return None if self._stage else load_tokenizer(self._source, self._settings.revision)
