"""Imported: predictions of another framework, evaluated on the same users and candidates as every model here.

Nothing is trained. A file (``predictions``) has a score or a rank for pairs of user and item, by token: see
:mod:`recbole_llm.evaluation.prediction_files`. Drawn candidates are ranked by it. In a full ranking, it has each user's list,
from which the items of the history are dropped as for every model. A target counts as missed if its user is not in the file or
if it is beyond the end of the list. A candidate that is not in the file ranks below all others. Such gaps are counted.

Legend: B users, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.model.abstract_recommender import GeneralRecommender
from torch import Tensor

from recbole_llm.config.metrics import describes_lists
from recbole_llm.config.predictions import predictions_file
from recbole_llm.data.candidate_sets import ranked_users
from recbole_llm.evaluation.prediction_files import read_predictions
from recbole_llm.evaluation.recommender import Facts, StagedRecommender, Variant
from recbole_llm.settings import Settings
from recbole_llm.store.files import sha256_file

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.store.stages import Stage

logger = getLogger()

FEW_USERS = 20
"""Of fewer users, a good model may find every target in short lists."""


@dataclass(frozen=True)
class ImportSettings(Settings):
    """Which columns and rows of the file are read, and its origin."""

    predictions_columns: Mapping[str, str | None]
    predictions_row: str | None
    origin: str | None


class Imported(StagedRecommender, GeneralRecommender):
    """The rankings of a file.

    Attributes:
        file: the file.
        predictions: its content.
        gaps: number of missing users, candidates and targets that the evaluation needs, by name.
    """

    has_validation = False

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        mode = config["eval_args"]["mode"]["test"]
        if mode != "full":
            raise ValueError(
                f"eval_args: mode {mode!r} at test draws other items in each run, for which no file has scores; give "
                "--eval_args=\"{'mode': 'candidates'}\" or \"{'mode': 'full'}\""
            )
        self.settings, self.file = ImportSettings.of(config), predictions_file(config)
        self.sha256 = sha256_file(self.file)
        self.histories, self.topk, self.masked = dataset.histories, max(config["topk"]), dataset.masking.general
        self.full_ranking = "test" not in config["candidate_phases"]
        ranked = ranked_users(config, self.histories, "test")
        self.ranked = self.histories.evaluated("test") if ranked is None else ranked.numpy()
        self.of_lists = [metric for metric in config["metrics"] if describes_lists(metric)]
        columns, row = self.settings.predictions_columns, self.settings.predictions_row
        tokens = self.histories.user_ids, self.histories.item_ids
        self.predictions = read_predictions(self.file, *tokens, columns=columns, row=row)
        self.gaps: dict[str, int] = {}
        self._without: dict[int, int] = {}  # number of candidates of each user that the file lacks
        self._candidates: CandidateSet | None = None

    def __str__(self) -> str:
        return f"Imported, predictions of {self.file.name}{f', {self.settings.origin}' if self.settings.origin else ''}"

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        self._candidates = candidates.get("test")
        return ()

    def check(self) -> None:
        """Refuse a file without any evaluation user, or whose lists are shorter than ``topk``; count other gaps.

        Metrics of the lists themselves are refused, too, where a list is shorter: RecBole would fill it up with any items.
        """
        users = self.ranked if self._candidates is None else self._candidates.users.numpy()
        lengths = self.predictions.lengths[users]
        if not lengths.any():
            raise ValueError(
                f"predictions: {self.file} has none of the {len(users)} evaluation users; give predictions for the users of "
                "the test split (recbole-llm data export writes it)"
            )
        self.gaps = {"users": len(users), "missing users": int((lengths == 0).sum())}
        if missing := self.gaps["missing users"]:
            logger.warning(
                f"predictions: {missing} of {len(users)} evaluation users are not in {self.file}; they count as missed"
            )
        if self.full_ranking:
            self._check_lists(users[lengths > 0])

    def _check_lists(self, users: np.ndarray) -> None:
        longest, items = int(self.predictions.lengths[users].max()), self.n_items - 1
        if longest < min(self.topk, items):
            raise ValueError(
                f"predictions: the lists of {self.file} have at most {longest} items, but topk goes to {self.topk}; give at "
                f"least {self.topk} items of each user, or give --topk with numbers up to {longest}"
            )
        dropped = short = found = 0
        for user, target in zip(users.tolist(), self.histories.targets(users.tolist(), "test"), strict=True):
            listed = self.predictions.listed(user)
            found += target in listed
            known = self.histories.before(user, "test") if self.masked else listed[:0]
            own = int(np.isin(listed, known).sum())
            dropped += own
            short += len(listed) - own < min(self.topk, items - len(np.unique(known)))
        self.gaps |= {"known items": dropped, "short lists": short}
        if dropped:
            logger.info(f"predictions: {dropped} items of the lists of {self.file} are in the user's history and are left out")
        if found == len(users) >= FEW_USERS and longest <= items // 2:
            logger.warning(
                f"predictions: in {self.file}, each of the {found} users has the target among at most {longest} of {items:,} "
                "items. If these are drawn candidates, this is not a full ranking; give --eval_args=\"{'mode': 'candidates'}\""
            )
        if self.of_lists and (lacking := short + self.gaps["missing users"]):
            raise ValueError(
                f"metrics: {', '.join(self.of_lists)} describe lists of {self.topk} items, and those of {lacking} users in "
                f"{self.file} are shorter; hand in longer lists, or lists without the history, or remove these metrics"
            )
        if short:
            logger.warning(
                f"predictions: {short} users have fewer than {self.topk} items in {self.file} that are not in their history; a "
                "target that is not among them counts as missed. Give longer lists, or lists without the history"
            )

    def variants(self) -> dict[str, Variant]:
        return {type(self).__name__: Variant(self._counted, self.full_sort_predict, partial=True)}

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue."""
        return self.predictions.scores(interaction[self.USER_ID]).to(self.device)

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] of candidates [B, C]."""
        return self.full_sort_predict(interaction).gather(1, candidates.to(self.device))

    def _counted(self, interaction: Any, candidates: Tensor) -> Tensor:
        """:meth:`score_candidates` of an evaluation, whose missing candidates are counted."""
        scores = self.score_candidates(interaction, candidates)
        without = (scores == -torch.inf).sum(1).tolist()
        self._without.update(zip(interaction[self.USER_ID].tolist(), without, strict=True))
        width = candidates.size(1)
        self.gaps |= {"candidates": width * len(self._without), "missing candidates": sum(self._without.values())}
        return scores

    @property
    def remark(self) -> str:
        """What the file lacks, in one line; empty if it lacks nothing."""
        counts = ((name, self.gaps.get(f"missing {name}", 0)) for name in ("users", "candidates"))
        found = [f"{missing:,} of {self.gaps[name]:,} {name} missing" for name, missing in counts if missing]
        short = self.gaps.get("short lists", 0)
        return ", ".join([*found, *([f"{short:,} lists shorter than {self.topk}"] if short else [])])

    def facts(self) -> Facts:
        content = {"file": str(Path(self.file)), "sha256": self.sha256, "origin": self.settings.origin}
        about = {"columns": dict(self.predictions.columns), "row": self.predictions.row}
        return Facts(imported={**content, **about, **self.gaps, "remark": self.remark})

    def report(self, folder: Path) -> list[str]:
        return [f"predictions: {self.remark}; what is missing counts as missed"] if self.remark else []
