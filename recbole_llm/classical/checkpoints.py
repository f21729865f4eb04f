"""Checkpoints of RecBole's trainers: written atomically, and loaded without executing code."""

from __future__ import annotations

import os
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from recbole.trainer import Trainer
from recbole.utils import get_local_time
from torch.nn.utils import clip_grad_norm_

from recbole_llm.classical import kgat, portable_weights
from recbole_llm.classical.curves import recorded
from recbole_llm.store.files import temporary_name, writer, writing
from recbole_llm.store.processes import current

logger = getLogger()


class SafeCheckpoints(Trainer):
    """A mixin for any trainer of RecBole.

    Attributes:
        training_state: what a trainer needs besides to resume, of tensors and plain values.
    """

    eval_step: int
    epochs: int

    def __init__(self, config: Any, model: Any):
        with recorded():
            super().__init__(config, model)
        # RecBole's trainer of one epoch (Pop, ItemKNN) would never validate, and so save nothing
        self.eval_step = min(self.eval_step, self.epochs)
        # in parallel runs, RecBole's own name is not unique: it has a resolution of one second; CHECKPOINT of store.files
        name = f"{config['model']}-{get_local_time()}-{writer()}.pth"
        self.saved_model_file = os.path.join(self.checkpoint_dir, name)
        self.training_state: dict[str, Any] = {}

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """RecBole's; with ``enable_scaler``, it clips gradients once they are unscaled, where RecBole clips scaled ones."""
        optimizer = super()._build_optimizer(**kwargs)
        if self.enable_scaler and (norm := self.config["clip_grad_norm"]):
            parameters = list(self.model.parameters())

            def clip(*_: Any) -> None:
                clip_grad_norm_(parameters, **norm)

            optimizer.register_step_pre_hook(clip)
            self.clip_grad_norm: Any = None  # which RecBole reads before it unscales
        return optimizer

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
            "other_parameter": _plain(self.model.other_parameter()),
            "optimizer": self.optimizer.state_dict(),
            "training_state": self.training_state,
        }
        try:
            with writing(Path(final)):
                torch.save(state, temporary)
                os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        if verbose:
            logger.info(f"saved {final}")

    def save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
        """Write a checkpoint during pre-training, from which another run can start (``pre_model_path``)."""
        self._save_checkpoint(epoch, saved_model_file=saved_model_file)

    def pretrain(self, train_data: Any, verbose: bool = True, show_progress: bool = False) -> Any:
        """RecBole's pre-training (RaCT, S3Rec). What is evaluated afterwards are the weights of its last epoch.

        RecBole's own checkpoints are named by model, dataset and epoch, so another run may have replaced them by then.
        """
        result = super().pretrain(train_data, verbose, show_progress)  # type: ignore[misc]
        self._save_checkpoint(self.config["pretrain_epochs"] - 1, verbose=False)
        logger.info(
            f"train_stage: {self.config['train_stage']} is done; the next one starts from these weights with "
            f"--pre_model_path={self.saved_model_file}"
        )
        return result

    def _read_checkpoint(self, file: str) -> dict[str, Any]:
        """A checkpoint's content, of tensors and plain values alone."""
        if file.endswith(".safetensors"):
            return portable_weights.read(Path(file), self.device)
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
        self.model.load_other_parameter(_restored(state.get("other_parameter")))
        kgat.attend(self.model)
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
        self.model.load_other_parameter(_restored(state.get("other_parameter")))
        self.optimizer.load_state_dict(state["optimizer"])
        self.training_state = state.get("training_state", {})
        logger.info(f"resuming from epoch {self.start_epoch} of {resume_file}")


_MATRIX = "scipy.sparse matrix"


def _plain(value: Any) -> Any:
    """``other_parameter`` of a model, so that it is read again without unpickling: matrices as tensors of their parts.

    Modules are left out (DIN, FDSA), since their weights are in the state of the model.
    """
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if not isinstance(entry, torch.nn.Module)}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if scipy.sparse.issparse(value):  # item-KNN, EASE and others
        rows = value.tocsr()
        parts = {name: torch.from_numpy(getattr(rows, name)) for name in ("data", "indices", "indptr")}
        return {_MATRIX: value.format, "shape": list(value.shape), "array": isinstance(value, scipy.sparse.sparray), **parts}
    if isinstance(value, np.ndarray | np.generic):
        return {"numpy": torch.from_numpy(np.asarray(value).copy())}
    return value


def _restored(value: Any) -> Any:
    """The values of :func:`_plain`."""
    if isinstance(value, list | tuple):
        return type(value)(map(_restored, value))
    if not isinstance(value, dict):
        return value
    if _MATRIX in value:
        kind = scipy.sparse.csr_array if value["array"] else scipy.sparse.csr_matrix
        parts = tuple(value[name].cpu().numpy() for name in ("data", "indices", "indptr"))
        return kind(parts, shape=tuple(value["shape"])).asformat(value[_MATRIX])
    if value.keys() == {"numpy"}:
        return value["numpy"].cpu().numpy()
    return {key: _restored(entry) for key, entry in value.items()}
