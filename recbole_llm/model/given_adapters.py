"""Adapters that the user gives (``adapters: {NAME: FOLDER}``): checked before anything is trained, then stages like the others.

The stage of a given adapter copies the folder and is named by a hash of its weights and config, so merges and cached scores
depend on both. It trains no parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from logging import getLogger
from pathlib import Path

from recbole_llm.costs.lora import AdapterShape
from recbole_llm.llm.adapter_fit import adapter_folder, check_base, check_fit
from recbole_llm.llm.adapter_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    adapter_fingerprint,
    check_changes,
    read_adapter,
)
from recbole_llm.llm.backbones import Backbone
from recbole_llm.llm.causal_lm import load_config
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import DamagedError
from recbole_llm.store.stages import Stage, Work

logger = getLogger()


@dataclass(frozen=True)
class GivenAdapters:
    """The value of the key ``adapters`` for one backbone.

    Args:
        given: name of an adapter of the model -> folder or hub id.
    """

    given: Mapping[str, str]
    backbone: Backbone

    def check_names(self, known: Iterable[str], model: str) -> None:
        """Refuse a name that is not an adapter of the model.

        Raises:
            ValueError: the error lists the known names.
        """
        names = list(known)
        if unknown := [name for name in self.given if name not in names]:
            listed = f"has {', '.join(map(repr, names))}" if names else "trains none that can be given"
            raise ValueError(f"adapters: {model} has no adapter {unknown[0]!r}; it {listed}")

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The checked local folder of each adapter.

        Raises:
            ValueError: a folder is missing, damaged, changes nothing or does not belong to the backbone.
        """
        return {name: self._checked(name, source) for name, source in self.given.items()}

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The SHA-256 of each adapter's weights and config."""
        return {name: adapter_fingerprint(folder) for name, folder in self.folders.items()}

    def facts(self) -> dict[str, dict[str, str]]:
        """What the run record says about them."""
        return {name: {"folder": self.given[name], "sha256": self.sha256[name]} for name in self.given}

    def label(self, name: str) -> str:
        """The name of an adapter's row in tables."""
        return f"{name} (given {self.sha256[name][:8]})" if name in self.given else name

    def stage(self, name: str) -> Stage:
        """The stage of a given adapter; its folder is a copy, with the name of this run's backbone as its base model."""
        folder, digest, backbone = self.folders[name], self.sha256[name], self.backbone

        def build(work: Work) -> None:
            if adapter_fingerprint(folder) != digest:
                raise DamagedError(f"adapters: {folder} has changed since the run began; start it again")
            source = backbone.source(work)
            adapter = read_adapter(folder, name)
            if backbone.stages:  # the others are checked before
                check_fit(adapter, folder, load_config(source))
            shutil.copyfile(folder / WEIGHTS_FILE, work.out / WEIGHTS_FILE)
            config = adapter.config | {"base_model_name_or_path": str(source)}
            (work.out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))

        stem = "-".join(name.replace("/", "-").replace(".", "_").split())
        depends = {"backbone": backbone.fingerprint, "adapter": digest}
        cost = Cost(note=f"given, nothing is trained: {self.given[name]}")
        return Stage(f"given-{stem}"[:120], depends, build, backbone.stages, with_imports=False, cost=lambda: cost)

    def shape(self, name: str) -> AdapterShape:
        """The sizes of a given adapter, for costs."""
        return AdapterShape.of_adapter(read_adapter(self.folders[name], name))

    def _checked(self, name: str, source: str) -> Path:
        try:
            if not isinstance(source, str):
                raise ValueError(f"{source!r} is neither a folder nor a hub id")
            folder = adapter_folder(source)
            adapter = read_adapter(folder, name)
            check_changes(adapter, folder)
            check_base(adapter, folder, self.backbone.base_name)
            if not self.backbone.stages:
                check_fit(adapter, folder, load_config(self.backbone.base_name, self.backbone.revision))
        except (ValueError, OSError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"adapters[{name!r}]: {error}") from error
        logger.info(f"adapter {name!r} is given: {_described(adapter, folder)}, used as it is, whatever it was trained on")
        return folder


def _described(adapter: Adapter, folder: Path) -> str:
    ranks = sorted({adapter.rank(module) for module in adapter.modules})
    scalings = sorted({round(adapter.scaling(module), 4) for module in adapter.modules})
    shown = [", ".join(map(str, values)) for values in (ranks, scalings)]
    return f"{folder} (rank {shown[0]}, scaling {shown[1]}, {len(adapter.modules)} modules)"
