"""The whole story in one function: config -> data -> candidates -> model -> stages -> evaluation -> record."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.utils import init_seed

from recbole_llm import compat, logs, registry
from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.evaluation import slices
from recbole_llm.evaluation.protocol import attach_candidates
from recbole_llm.evaluation.record import RunRecord, table

logger = getLogger()


def run_recbole_llm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    cmd_line: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and evaluate one model, ours or RecBole's, and write its run record.

    A model with ``report(folder) -> list[str]`` may then write into the record's folder; the log shows the lines it returns.

    Args:
        model, dataset, config_file_list, config_dict, saved: as RecBole's ``run_recbole``.
        cmd_line: ``--key=value`` arguments; they win over everything else.

    Returns:
        RecBole's result dict (``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result``) with
        ``controls`` (name -> test result) and ``record`` (path of the run record) beside it.
    """
    began = time.monotonic()
    config = LLMConfig(model, dataset, config_file_list, config_dict, cmd_line)
    compat.refuse_options(config.external_config_dict)
    init_seed(config["seed"], config["reproducibility"])
    logs.init_logging(config)
    slices.check(config["slices"])  # now: after a training is late for a typing error
    logger.info(logs.configuration_line(config))

    data = create_dataset(config)
    logger.info(logs.dataset_line(data))
    train_data, valid_data, test_data = data_preparation(config, data)
    attach_candidates(config, data, train_data, valid_data, test_data)

    init_seed(config["seed"], config["reproducibility"])  # whatever was drawn so far, every model starts alike
    network = config.model_class(config, train_data._dataset).to(config["device"])
    logger.info(logs.model_line(network))
    trainer = registry.get_trainer(config)(config, network)
    best_valid_score, best_valid_result = trainer.fit(train_data, valid_data, saved=saved, show_progress=config["show_progress"])
    waited = network.cache.waited if hasattr(network, "cache") else 0.0
    trained = time.monotonic() - waited
    test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=config["show_progress"])
    record = RunRecord(config, network, trainer, valid_data, test_data)
    record.add(config["model"], test_result, trainer.ranks)
    for name, control in getattr(network, "controls", dict)().items():
        with control():
            result = trainer.evaluate(test_data, load_best_model=False, show_progress=config["show_progress"])
        record.add(name, result, trainer.ranks)

    path = record.write(
        best_valid_result=best_valid_result,
        seconds={"train": trained - began, "evaluate": time.monotonic() - waited - trained, "waited": waited},
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    logger.info(f"best valid result: {logs.metrics_line(best_valid_result)}")
    logger.info(f"test result: {logs.metrics_line(test_result)}")
    logger.info(f"{record.heading}\n{table(record.rows)}\nrun record: {path}")
    for line in network.report(path.parent) if hasattr(network, "report") else ():
        logger.info(line)
    return {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": record.rows[0].metrics,
        "controls": {row.name: row.metrics for row in record.rows[1:]},
        "record": str(Path(path)),
    }
