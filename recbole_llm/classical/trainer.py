"""RecBole's trainers under the candidate protocol, and the trainer that runs the stages of an LLM model.

:class:`ProtocolTrainer` is mixed into whichever trainer RecBole uses for a model, so that baselines and LLM models are
measured by the same code on the same candidates; checkpoints are written whole and loaded without executing anything.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score, get_local_time
from recbole.utils import get_trainer as recbole_get_trainer
from torch import Tensor

from recbole_llm.classical.cloze import MASKED_MODELS, MaskedTraining
from recbole_llm.classical.sequence import CAUSAL_MODELS, SequenceTraining
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.evaluation.ranks import Ranks, SafeCollector, gather_scores, spread
from recbole_llm.store.files import fingerprint
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.scores import CachedScores

logger = getLogger()


class ProtocolTrainer(Trainer):
    """Evaluation on fixed candidates and safe checkpoints, for any RecBole trainer."""

    candidates: CandidateSet | None = None
    ranks: Ranks
    _bar: Any = None  # of the evaluation that is under way
    users_per_second: float | None = None  # of the last evaluation; None where scores of an earlier one were taken

    def __init__(self, config: Any, model: Any):
        super().__init__(config, model)
        self.eval_collector = SafeCollector(config)
        # RecBole's name has a resolution of one second, at which parallel runs collide
        name = f"{config['model']}-{get_local_time()}-{uuid.uuid4().hex[:8]}.pth"
        self.saved_model_file = str(Path(self.checkpoint_dir) / name)
        self._written_here: set[str] = set()
        self.ranks = Ranks()

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        # RecBole's bar is made of control characters that only a terminal understands
        return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress and sys.stderr.isatty())

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """RecBole's ``evaluate``; the ranks of this pass are in ``self.ranks`` afterwards."""
        if not eval_data:
            return None
        if load_best_model:
            self._load_weights(model_file or self.saved_model_file)
        self.candidates = getattr(eval_data, "candidates", None)
        self.ranks = Ranks()
        began = time.monotonic()
        with progress_bar("evaluation", len(eval_data), show=show_progress) as self._bar:
            result = super().evaluate(eval_data, load_best_model=False, show_progress=False)
        self.users_per_second = len(self.ranks.users) / (time.monotonic() - began) or None
        if self.ranks.tie_rate > 0.01:
            logger.info(f"ties: the target's score equals another candidate's for {self.ranks.tie_rate:.1%} of the users")
        return result

    def _neg_sample_batch_eval(self, batched_data: Any) -> Any:
        self._advance()
        return super()._neg_sample_batch_eval(batched_data)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.advance()

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        self._advance()
        interaction, _, positive_u, positive_i = batched_data
        if self.candidates is None:
            collected = super()._full_sort_batch_eval(batched_data)
            if len(positive_u) == len(interaction):  # one target a row: leave-one-out
                self.ranks.add(interaction[self.config["USER_ID_FIELD"]], collected[1], positive_i.to(self.device))
            return collected
        users = interaction[self.config["USER_ID_FIELD"]]
        covered = self.candidates.covers(users)
        if not covered.all():  # users with too few interactions to be split alike by every model
            interaction, users, positive_i = interaction[covered], users[covered], positive_i[covered]
        listed = self.candidates.lookup(users, positive_i).to(self.device)  # [B, C]
        interaction = interaction.to(self.device)
        scores = self._candidate_scores(interaction, listed).float()  # [B, C]
        target = positive_i.to(self.device)
        found = listed == target[:, None]  # [B, C]; a retriever may have missed the target
        self.ranks.add(users, scores, found.int().argmax(1), missed=~found.any(1))
        assert self.tot_item_num is not None
        return interaction, spread(scores, listed, self.tot_item_num), torch.arange(len(users)), positive_i

    def _candidate_scores(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] of candidates [B, C]: by the LLM, by gathering a full ranking, or item by item."""
        if not len(candidates):  # eval_users leaves some batches without a user, and few models take an empty one
            return candidates.float()
        if hasattr(self.model, "score_candidates"):
            return self.model.score_candidates(interaction, candidates)
        return gather_scores(self.model, interaction, candidates, self.config["ITEM_ID_FIELD"])

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        final = kwargs.pop("saved_model_file", self.saved_model_file)
        temporary = f"{final}.{uuid.uuid4().hex[:8]}.tmp"
        state = {
            "config": self.config.plain() if hasattr(self.config, "plain") else None,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, final)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._written_here.add(str(final))
        if verbose:
            logger.info(f"Saving current: {final}")

    def _read_checkpoint(self, file: str) -> dict[str, Any]:
        """A checkpoint's content; nothing in a file from elsewhere is executed."""
        if str(file) in self._written_here:
            # item-KNN, EASE and others keep scipy matrices, which only a pickle holds: trusted, this process wrote it
            return torch.load(file, map_location=self.device, weights_only=False)
        try:
            return torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{file}: not a checkpoint that can be loaded without executing code ({type(error).__name__}); "
                f"train the model again with this command, or convert the file yourself if you trust it"
            ) from error

    def _load_weights(self, file: str) -> None:
        state = self._read_checkpoint(file)
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        logger.info(f"Loading model structure and parameters from {file}")

    def load_best(self) -> None:
        """Put the best weights of this trainer's ``fit`` back into the model."""
        self._load_weights(self.saved_model_file)

    def resume_checkpoint(self, resume_file: str) -> None:
        """Go on from a checkpoint that this class wrote."""
        self.saved_model_file = str(resume_file)
        state = self._read_checkpoint(self.saved_model_file)
        self.start_epoch = state["epoch"] + 1
        self.cur_step = state["cur_step"]
        self.best_valid_score = state["best_valid_score"]
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        self.optimizer.load_state_dict(state["optimizer"])
        logger.info(f"Checkpoint loaded. Resume training from epoch {self.start_epoch}")


class StageTrainer(ProtocolTrainer):
    """Trainer of our models: ``fit`` runs the stages that are not kept yet, then validates once."""

    _scores: CachedScores | None = None

    def _build_optimizer(self, **kwargs: Any) -> Any:
        return None  # each stage has its own, over what it trains

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """Run the model's stages; returns RecBole's (best valid score, best valid result)."""
        self.eval_collector.data_collect(train_data)
        self.model.run_stages()
        if not valid_data:
            return -1, None
        self.best_valid_result = self.evaluate(valid_data, load_best_model=False, show_progress=show_progress)
        self.best_valid_score = calculate_valid_score(self.best_valid_result, self.valid_metric)
        return self.best_valid_score, self.best_valid_result

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's; the kept stages are the best model, so there is nothing to load, and kept scores are found again."""
        candidates = getattr(eval_data, "candidates", None)
        if not candidates or not self.model.answer_fingerprint:
            return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        name = fingerprint([self.model.answer_fingerprint, candidates.sha256, candidates.users.tolist()])
        self._scores = CachedScores(Path(self.checkpoint_dir) / "scores" / name[:16])
        result = super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        self._scores.close()
        if self._scores.found:
            self.users_per_second = None
        return result

    def _candidate_scores(self, interaction: Any, candidates: Tensor) -> Tensor:
        if self._scores is None:
            return super()._candidate_scores(interaction, candidates)
        users = interaction[self.config["USER_ID_FIELD"]]
        scores = self._scores.find(users)
        if scores is None:
            scores = super()._candidate_scores(interaction, candidates)
            self._scores.add(users, scores)
        return scores.to(candidates.device)


def trainer_class(config: Any) -> type[Any]:
    """The trainer for a configured model.

    Raises:
        ValueError: an unknown ``train_mode``.
    """
    if hasattr(config.model_class, "run_stages"):
        return StageTrainer
    base = recbole_get_trainer(config["MODEL_TYPE"], config["model"])
    bases: tuple[type, ...] = (ProtocolTrainer,) if base is Trainer else (ProtocolTrainer, base)
    if config["train_mode"] not in ("auto", "sequence", "prefix"):
        raise ValueError(f"train_mode: {config['train_mode']!r} is unknown; choose auto, sequence or prefix")
    if config["train_mode"] == "sequence" and config["model"] in MASKED_MODELS:
        bases = (MaskedTraining, *bases)
    elif config["train_mode"] == "sequence" or (config["train_mode"] == "auto" and config["model"] in CAUSAL_MODELS):
        logger.info(f"train_mode: sequence ({config['model']} is causal; --train_mode=prefix is RecBole's own loop)")
        bases = (SequenceTraining, *bases)
    return type(f"Protocol{base.__name__}", bases, {})
