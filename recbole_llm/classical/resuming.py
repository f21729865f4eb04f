"""A training by RecBole's trainer that is killed goes on from an epoch; on a CPU it ends with the weights of one that was not.

RecBole's own checkpoints have the best weights so far. Those here are written before an epoch, in a folder of their own, and have
all that the epoch depends on: the optimiser, the averaged weights, the random state, the counters of early stopping.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.trainer import Trainer
from safetensors.torch import load_file

from recbole_llm.classical.checkpoints import SafeCheckpoints
from recbole_llm.store.files import DamagedError, atomic_folder, is_complete, save_tensors, verify
from recbole_llm.store.json_files import read_object
from recbole_llm.store.processes import current
from recbole_llm.store.random_state import restore_rng, rng_state
from recbole_llm.training.saving import next_save

logger = getLogger()


class ResumableTraining(SafeCheckpoints):
    """A mixin for RecBole's ``Trainer``; its trainers with a loop of their own are not resumed.

    Attributes:
        scratch: folder of the state; None: the training is not resumed.
        earlier: seconds that killed runs have spent on the training.
    """

    scratch: Path | None = None
    earlier = 0.0
    _random: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None = None
    _began = _due = 0.0
    _first: Mapping[str, tuple[int, int]]  # versions of the model's tensors before the training

    @property
    def is_resumable(self) -> bool:
        """Whether ``Trainer.fit`` trains the model, in one process; LINE shuffles a list of its own while it is trained."""
        others = [base for base in type(self).__mro__ if base.__module__ == Trainer.__module__ and base is not Trainer]
        own_loop = any(issubclass(base, Trainer) for base in others) or self.config["model"] == "LINE"
        return current().size == 1 and not own_loop

    def fit(self, *arguments: Any, **keywords: Any) -> Any:
        """RecBole's, from the epoch that a killed run was at."""
        self._began = time.monotonic()
        self._first = _versions(_tensors(self.model))
        if self.scratch is not None:
            self._due = self._began + self.config["save_every_seconds"]
            self._resume(self.scratch / "epoch")
        return super().fit(*arguments, **keywords)

    def _train_epoch(self, train_data: Any, epoch_idx: int, *arguments: Any, **keywords: Any) -> Any:
        if self._random is not None:
            tensors, values = self._random
            restore_rng(tensors, values)
            for name, generator in _generators(train_data):
                generator.set_state(tensors[name])
            self._random = None
        elif self.scratch is not None and epoch_idx and (began := time.monotonic()) >= self._due:
            self._save(self.scratch / "epoch", epoch_idx, train_data)
            self._due = next_save(began, self.config["save_every_seconds"])
        return super()._train_epoch(train_data, epoch_idx, *arguments, **keywords)

    def _save(self, folder: Path, epoch: int, train_data: Any) -> None:
        tensors, values = rng_state()
        tensors |= {name: generator.get_state() for name, generator in _generators(train_data)}
        of_model = _tensors(self.model)
        changed = [name for name, version in _versions(of_model).items() if version != self._first.get(name)]
        tensors |= {f"model.{name}": of_model[name] for name in changed}
        numbers = {name: value for name, value in vars(self.model).items() if type(value) in (int, float)}  # MultiVAE's steps
        best = Path(self.saved_model_file)
        state = {
            "random": values,
            "best": best.name if best.is_file() else None,
            "best_valid_result": self.best_valid_result and {name: float(one) for name, one in self.best_valid_result.items()},
            "losses": self.train_loss_dict,
            "numbers": numbers,
            "seconds": self.earlier + time.monotonic() - self._began,
        }
        with atomic_folder(folder) as out:
            self._save_checkpoint(epoch - 1, verbose=False, saved_model_file=str(out / "model.pth"))
            save_tensors(out / "training.safetensors", tensors)
            (out / "values.json").write_text(json.dumps(state))

    def _resume(self, folder: Path) -> None:
        if not is_complete(folder):
            return
        try:
            verify(folder)
        except DamagedError as error:
            logger.warning(f"{self.config['model']}: {error}; not resumed from it")
            return
        state, own = read_object(folder / "values.json"), self.saved_model_file
        best = Path(self.checkpoint_dir) / str(state["best"])
        if state["best"] is not None and not best.is_file():
            logger.warning(f"{self.config['model']}: {best}, the best weights so far, is missing; the training starts anew")
            return
        self.resume_checkpoint(str(folder / "model.pth"))
        self.saved_model_file = own if state["best"] is None else str(best)
        self.best_valid_result, self.earlier = state["best_valid_result"], state["seconds"]
        self.train_loss_dict = {int(epoch): loss for epoch, loss in state["losses"].items()}
        tensors = load_file(folder / "training.safetensors")
        own_tensors = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        for name, value in (state["numbers"] | {name: value.to(self.device) for name, value in own_tensors.items()}).items():
            setattr(self.model, name, value)
        self._random = tensors, state["random"]


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that a model keeps beside its weights and buffers, such as DiffRec's earlier losses."""
    return {name: one for name, one in vars(model).items() if isinstance(one, torch.Tensor) and one.layout == torch.strided}


def _versions(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """What differs once a tensor is replaced or changed: most of a model's are large and stay as they are."""
    return {name: (id(value), value._version) for name, value in tensors.items()}


def _generators(loader: Any) -> Iterator[tuple[str, torch.Generator]]:
    """The random generators of a loader, by name; its sampler draws from the same ones."""
    return ((f"loader.{name}", value) for name, value in vars(loader).items() if isinstance(value, torch.Generator))
