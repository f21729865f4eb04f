"""RecBole's trainers with stages before training and fixed candidates in evaluation.

:class:`ProtocolTrainer` is a mixin for any trainer of RecBole, so that the same code evaluates baselines and LLM models on the
same candidates.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from recbole.utils import calculate_valid_score, init_seed
from torch import Tensor

from recbole_llm.classical.resuming import ResumableTraining
from recbole_llm.classical.trial import evaluation_cost, training_cost
from recbole_llm.evaluation.beyond_accuracy import SafeCollector, accuracy
from recbole_llm.evaluation.full_ranking import FullRanking, RandomTies, finite
from recbole_llm.evaluation.ranks import (
    Ranks,
    candidate_rows,
    covered,
    early_stopping_users,
    exclude_missed,
    of_users,
    target_slots,
)
from recbole_llm.evaluation.recommender import ClassicalRecommender, Variant, recommender_of
from recbole_llm.store.costs import Cost, Measured, metered
from recbole_llm.store.files import sha256_file
from recbole_llm.store.processes import current
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.scores import CachedScores
from recbole_llm.store.stages import Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidate_sets import CandidateRetriever
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.evaluation.predictions import PredictionWriter

logger = getLogger()


class ProtocolTrainer(ResumableTraining):
    """Stages before training, evaluation of variants on fixed candidates, and safe checkpoints, for any RecBole trainer.

    Attributes:
        recommender: the model as a :class:`~recbole_llm.evaluation.recommender.Recommender`.
        cache: the results of its stages.
        ranks: of the last evaluation.
        users_per_second: of the last evaluation; None if it used cached scores.
        waited: seconds that evaluations have waited for other runs that computed the same scores.
        validated: number of users of the validation after training; None if RecBole's trainer validates.
        training, validation: what RecBole's ``fit`` or that validation has cost; None until it is done.
        predictions: writes the rankings of the evaluation; None if they are not saved.
    """

    def __init__(self, config: Any, model: Any):
        super().__init__(config, model)
        self.recommender = recommender_of(model, config)
        self.cache = StageCache(Path(config["checkpoint_dir"]) / "stages", seed=config["seed"])
        self.eval_collector = SafeCollector(config)
        self._stages: Sequence[Stage] = ()
        self._checked = False
        self._retriever: CandidateRetriever | None = None
        self._candidates: CandidateSet | None = None
        self._ranking: FullRanking
        self._variant: Variant
        self._scores: CachedScores | None = None
        self._bar: Any
        self._users: Tensor | None = None  # of early stopping; None: all of the data
        self._ranked: Tensor | None = None  # of an evaluation; None: all
        self.ranks = Ranks()
        self.users_per_second: float | None = None
        self.waited = 0.0
        self.validated: int | None = None
        self.training: Measured | None = None
        self.validation: Measured | None = None
        self.predictions: PredictionWriter | None = None
        self.optimizer: Any

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """RecBole's; None if the model has no parameters yet, or its stages are the whole training."""
        if any(True for _ in self.model.parameters()) and not recommender_of(self.model, self.config).trained_in_stages:
            return super()._build_optimizer(**kwargs)
        return None

    # -- training ------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet], retriever: CandidateRetriever | None = None) -> Sequence[Stage]:
        """The stages that :meth:`fit` will run; trains nothing.

        Args:
            candidates: candidate sets by phase.
            retriever: the source of the candidates, if it is a model.
        """
        self._stages, self._retriever = self.recommender.plan(candidates), retriever
        return [*([retriever.stage] if retriever else []), *self._stages]

    @property
    def trained_parameters(self) -> int | None:
        """Number of parameters trained in the stages (that of the builtin LM included) or by RecBole's trainer."""
        if self.recommender.trained_in_stages:
            return self.cache.trained(self._stages[0]) if self._stages else 0
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def check(self) -> None:
        """Refuse, before the first stage runs, what would fail or be wrong after the training; once."""
        if not self._checked:
            self.recommender.check()
        self._checked = True

    def _run_stages(self) -> None:
        self.check()
        if self._retriever is not None:
            self._retriever.load(self.cache.run(self._retriever.stage))
        if self._stages:
            self.cache.run(*self._stages)
        self.recommender.load(self.cache)

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """Run the stages that are not cached, then RecBole's ``fit``, or one validation if the stages are the whole training."""
        self._run_stages()
        if not self.recommender.trained_in_stages:
            if self.optimizer is None:  # stages made the parameters, so the random state depends on what was cached
                init_seed(self.config["seed"], self.config["reproducibility"])
                self.optimizer = self._build_optimizer()
            if not self.config["epochs"]:
                logger.warning("epochs: 0: nothing is trained, and the initial weights are evaluated")
            with metered() as self.training:
                best = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
            self.training.seconds += self.earlier
            return best
        if not valid_data or not self.recommender.has_validation:
            return -1, None
        self._users = early_stopping_users(valid_data, self.config["seed"], self.config["valid_users"])
        with metered() as self.validation:
            self.best_valid_result = self.evaluate(valid_data, load_best_model=False, show_progress=show_progress)
        self._users, self.validated = None, len(self.ranks.users)
        logger.info(f"validated on the {self.validated} users of early stopping (valid_users)")
        self.best_valid_score = calculate_valid_score(self.best_valid_result, self.valid_metric)
        return self.best_valid_score, self.best_valid_result

    def restore(self, cache: StageCache, checkpoint: Path | None) -> None:
        """Load a trained model in place of :meth:`fit`.

        Args:
            cache: the results of its stages.
            checkpoint: weights that RecBole's trainer saved; None if the stages were the whole training.
        """
        self.cache = cache
        self._run_stages()
        if checkpoint is not None:
            self._load_weights(str(checkpoint))
        self.model.eval()

    @property
    def checkpoint(self) -> dict[str, str] | None:
        """Name and SHA-256 of the file of weights that RecBole's ``fit`` saved; None if it saved none."""
        file = Path(self.saved_model_file)
        if self.recommender.trained_in_stages or not file.is_file():
            return None
        return {"file": file.name, "sha256": sha256_file(file)}

    @classmethod
    def batches(cls, config: Any, model: Any, train_data: Any) -> tuple[Any, Any]:
        """The batches of an epoch, and the loss of each."""
        return train_data, model.calculate_loss

    def training_cost(self, train_data: Any, valid_data: Any) -> Cost:
        """What RecBole's ``fit`` costs after the stages, before anything is trained."""
        recommender = self.recommender
        return training_cost(self.config, recommender.trial_model, type(self), train_data, valid_data)

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        # RecBole's bar contains control characters for terminals
        return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress and sys.stderr.isatty() and current().main)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
        variant: Variant | None = None,
    ) -> Any:
        """RecBole's ``evaluate`` of the model, or a variant of it; sets ``ranks`` and ``users_per_second``."""
        if not eval_data:
            return None
        if load_best_model and not self.recommender.trained_in_stages:
            self._load_weights(model_file or self.saved_model_file)
        self._variant = variant or next(iter(self.recommender.variants().values()))
        self._candidates, data = getattr(eval_data, "candidates", None), eval_data._dataset
        self._ranked = getattr(eval_data, "users", None) if self._users is None else self._users
        longest = max(*self.config["topk"], 1 if self.predictions is None else self.predictions.topk)
        self._ranking = FullRanking(data.known_items, RandomTies(*data.tokens), longest)
        self._scores = self._cached_scores(self._variant, eval_data)
        given = [metric.lower() for metric in self.evaluator.config["metrics"]]
        self.evaluator.metrics = given if self._candidates is None else accuracy(given)
        self.ranks = Ranks()
        with contextlib.nullcontext(0.0) if self._scores is None else self._scores.computed() as waited:
            self.waited += waited
            began = time.monotonic()
            with progress_bar("evaluation", len(eval_data), show=show_progress) as self._bar:
                result = super().evaluate(eval_data, load_best_model=False, show_progress=False)
            self.users_per_second = len(self.ranks.users) / (time.monotonic() - began) or None
        if self._scores is not None and self._scores.found:
            self.users_per_second = None
        if (tied := self.ranks.tie_rate) > 0.01:
            level = WARNING if tied > 0.5 else INFO  # the metrics are then mostly chance
            logger.log(level, f"ties: the target has the score of another item for {tied:.1%} of the users; they rank at random")
        return result

    def is_free(self, eval_data: Any, variant: Variant) -> bool:
        """Whether no other run computes at present what an evaluation of the variant would wait for."""
        scores = self._cached_scores(variant, eval_data)
        return scores is None or scores.is_free

    def _cached_scores(self, variant: Variant, eval_data: Any) -> CachedScores | None:
        """The cache of the variant's scores of the candidates; None if they are not to be cached."""
        candidates = getattr(eval_data, "candidates", None)
        if candidates is None:
            return None
        users = candidates.users if self._users is None else self._users
        folder = variant.scores_folder(self.checkpoint_dir, candidates.sha256, users)
        return None if folder is None else CachedScores(folder)

    def _neg_sample_batch_eval(self, batched_data: Any) -> Any:
        self._bar.advance()
        return super()._neg_sample_batch_eval(batched_data)

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        self._bar.advance()
        batched_data = of_users(batched_data, self.config["USER_ID_FIELD"], self._ranked)
        if self._candidates is None:
            return self._full_ranking(batched_data)
        interaction, _, _, positive_i = batched_data
        interaction, users, positive_i = covered(self._candidates, interaction, positive_i, self.config["USER_ID_FIELD"])
        listed = self._candidates.lookup(users, positive_i).to(self.device)  # [B, C]
        scores = self._candidate_scores(interaction.to(self.device), users, listed)  # [B, C]
        scores = scores if self._variant.partial else finite(scores)
        if self.predictions is not None:
            self.predictions.add(users, listed, scores)
        target = positive_i.to(self.device)  # [B]
        rows, columns, missed = candidate_rows(scores, listed, target, max(self.config["topk"]), partial=self._variant.partial)
        self.ranks.add(users, scores, target_slots(listed, target)[0], missed)
        return interaction, rows, torch.arange(len(users)), columns

    def evaluation_cost(self, eval_data: Any, *, early_stopping: bool = False) -> Cost:
        """What :meth:`evaluate` of all variants costs, before training, or of the model on the users of early stopping."""
        if not self.recommender.trained_in_stages:
            return evaluation_cost(self.config, self.recommender.trial_model, eval_data)
        seed, number = self.config["seed"], self.config["valid_users"]
        users = early_stopping_users(eval_data, seed, number) if early_stopping else getattr(eval_data, "users", None)
        return self.recommender.cost(list(self._listed(eval_data, users)), self.cache, all_rows=not early_stopping)

    def _listed(self, eval_data: Any, users: Tensor | None) -> Iterator[tuple[Any, Tensor | None]]:
        """The users [B] of each batch that :meth:`evaluate` scores, as interactions, with their candidates [B, C] if any."""
        for batch in eval_data:
            chosen = batch if users is None else of_users(batch, self.config["USER_ID_FIELD"], users)
            interaction, _, _, positive_i = chosen
            if not len(interaction):
                continue
            if not eval_data.candidates:
                yield interaction, None
                continue
            interaction, known, targets = covered(eval_data.candidates, interaction, positive_i, self.config["USER_ID_FIELD"])
            if len(known):
                yield interaction, eval_data.candidates.lookup(known, targets)

    def _full_ranking(self, batched_data: Any) -> Any:
        interaction, _, positive_u, positive_i = batched_data
        if not len(interaction):  # no user of early stopping
            return interaction, torch.empty(0, self.tot_item_num), positive_u, positive_i
        if isinstance(self.recommender, ClassicalRecommender):  # RecBole's method also ranks item by item
            _, scores, _, _ = super()._full_sort_batch_eval((interaction, None, positive_u, positive_i))
        else:
            scores = self._variant.score_catalogue(interaction.to(self.device)).view(-1, self.tot_item_num)  # [B, I]
        users = interaction[self.config["USER_ID_FIELD"]]
        masked, ranked = self._ranking(scores, interaction.to(self.device), users, (positive_u, positive_i), self._variant)
        if self.predictions is not None:
            self.predictions.add_catalogue(users, masked, ranked)
        missed = exclude_missed(ranked, positive_u, positive_i) if self._variant.partial else None
        if len(positive_u) == len(interaction):  # leave-one-out: one target per row
            self.ranks.add(users, masked, positive_i.to(self.device), missed, untied=ranked)
        return interaction, ranked, positive_u, positive_i

    def _candidate_scores(self, interaction: Any, users: Tensor, candidates: Tensor) -> Tensor:
        """Scores [B, C] in fp32 of candidates [B, C] by the variant, from the cache if there are any."""
        if not len(candidates):  # eval_users leaves some batches empty, which few models support
            return candidates.float()
        cached = self._scores.find(users) if self._scores is not None else None
        if cached is not None:
            return cached.to(candidates.device)
        scores = self._variant.score(interaction, candidates).float().to(candidates.device)  # [B, C]; device_map may differ
        if self._scores is not None:
            self._scores.add(users, scores)
        return scores
