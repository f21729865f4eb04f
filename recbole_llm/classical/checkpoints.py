"""Checkpoints of RecBole's trainers: written atomically, and loaded without executing code."""

from __future__ import annotations

import os
import uuid
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import get_local_time

from recbole_llm.store.files import temporary_name
from recbole_llm.store.processes import current

logger = getLogger()


class SafeCheckpoints(Trainer):
    """A mixin for any trainer of RecBole.

    Attributes:
        training_state: what a trainer needs besides to resume, of tensors and plain values.
    """

    def __init__(self, config: Any, model: Any):
        super().__init__(config, model)
        # in parallel runs, RecBole's own name is not unique: it has a resolution of one second
        name = f"{config['model']}-{get_local_time()}-{uuid.uuid4().hex[:8]}.pth"
        self.saved_model_file = os.path.join(self.checkpoint_dir, name)
        self._written_here: set[str] = set()
        self.training_state: dict[str, Any] = {}

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float]]:
        """RecBole's; all processes of the run go on by the result of the first."""
        score, result = super()._valid_epoch(*args, **kwargs)
        if current().size == 1:
            return score, result
        agreed: list[Any] = current().agree([float(score), {name: float(value) for name, value in result.items()}])
        return agreed[0], agreed[1]

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        processes = current()
        self.saved_model_file = processes.agree(self.saved_model_file)
        final = kwargs.pop("saved_model_file", self.saved_model_file)
        if processes.main:
            self._write_checkpoint(final, epoch, verbose=verbose)
        processes.wait()

    def _write_checkpoint(self, final: str, epoch: int, *, verbose: bool) -> None:
        temporary = temporary_name(Path(final))
        state = {
            "config": self.config.plain() if hasattr(self.config, "plain") else None,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
            "training_state": self.training_state,
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self._written_here.add(str(final))
        if verbose:
            logger.info(f"saved {final}")

    def _read_checkpoint(self, file: str) -> dict[str, Any]:
        """A checkpoint's content. Only files that this trainer wrote are unpickled."""
        if str(file) in self._written_here:
            # the scipy matrices of item-KNN, EASE and others need pickle
            return torch.load(file, map_location=self.device, weights_only=False)
        try:
            return torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{file}: not a checkpoint that can be loaded without executing code ({type(error).__name__}); "
                f"train the model again with this command, or convert the file if you trust it"
            ) from error

    def _load_weights(self, file: str) -> None:
        state = self._read_checkpoint(file)
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        logger.info(f"loaded the weights of {file}")

    def load_best(self) -> None:
        """Load the best weights of ``fit`` into the model."""
        self._load_weights(self.saved_model_file)

    def resume_checkpoint(self, resume_file: str) -> None:
        """Resume from a checkpoint of this class."""
        self.saved_model_file = str(resume_file)
        state = self._read_checkpoint(self.saved_model_file)
        self.start_epoch = state["epoch"] + 1
        self.cur_step = state["cur_step"]
        self.best_valid_score = state["best_valid_score"]
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        self.optimizer.load_state_dict(state["optimizer"])
        self.training_state = state.get("training_state", {})
        logger.info(f"resuming from epoch {self.start_epoch} of {resume_file}")
