"""One run: configuration, data, candidates, model, stages, evaluation, run record."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed

from recbole_llm import logs
from recbole_llm.classical import building
from recbole_llm.classical.record_code import record_code
from recbole_llm.classical.record_inputs import keep_aside, record_inputs
from recbole_llm.classical.retriever import Retriever
from recbole_llm.classical.shared import check_shared
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.config import LLMConfig
from recbole_llm.config.run_config import given_value
from recbole_llm.costs.devices import Card, card
from recbole_llm.costs.parts import EXACT, counting
from recbole_llm.costs.plan import Plan
from recbole_llm.data.candidate_sets import candidate_sets, ranked_users
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.data.split_facts import split_lines
from recbole_llm.evaluation import generated, predictions, slices
from recbole_llm.evaluation.known_splits import identify
from recbole_llm.evaluation.record import RunRecord
from recbole_llm.planner import ANSWERS, TEST, TRAINING, VALIDATION, on_card, plan_of
from recbole_llm.run_results import RunResults
from recbole_llm.store import curves, trackers
from recbole_llm.store.costs import Measured, metered
from recbole_llm.store.files import fingerprint
from recbole_llm.store.launcher import asks_for_fsdp
from recbole_llm.store.leftovers import temporaries
from recbole_llm.store.locks import only_one
from recbole_llm.store.processes import Processes, alone, joined
from recbole_llm.store.progress import shown
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Stage
from recbole_llm.store.trials import trials
from recbole_llm.training.float32 import set_precision

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

    Args:
        model, dataset, config_file_list, config_dict, saved: as RecBole's ``run_recbole``.
        cmd_line: ``--key=value`` arguments, which override everything else.

    Returns:
        RecBole's result dict (``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result``) with
        ``variants`` (test results by name), ``published`` (results of ``scoring: published`` by name) and ``record`` (path of
        the run record).
    """
    on_cpu = given_value("use_gpu", config_file_list, config_dict, cmd_line) is False
    with joined(on_cpu=on_cpu) as processes:  # before the configuration, which looks for the accelerator
        config = LLMConfig(model, dataset, config_file_list, config_dict, cmd_line)
        return _run(config, saved, processes)


def _run(config: LLMConfig, saved: bool, processes: Processes) -> dict[str, Any]:
    """The run of a configuration in one of several processes, or in the only one."""
    began = time.monotonic()
    _check_processes(config, processes)
    inputs = record_inputs(config)
    made_of: dict[str, Any] = {"code": record_code(config), "inputs": inputs}  # of now: files may change while it runs
    names = trackers.chosen(config["report_to"], log_wandb=config["log_wandb"])  # in all processes, for its errors
    log_file = logs.init_logging(config, silent=not processes.main)
    logger.info(logs.configuration_line(config))
    if processes.size > 1:
        logger.info(f"{processes.size} processes: each has its share of every training step and of the LM's batches")
    if processes.main and (aside := keep_aside(config.record_file, inputs)):
        logger.warning(f"{config.record_file.parent} was a run on other data of the same name; it is {aside} now")
    for leftover in temporaries(Path(config["checkpoint_dir"])) if processes.main else ():
        leftover.remove()
    run = assemble(config)
    predictions.check(config, run.test)
    _warn_of_idle(run)
    run.trainer.check()  # finds out how the LM is run, which the plan depends on
    planned = run.plan() if processes.main else None
    logger.info(str(planned))
    if planned is not None and config["show_progress"]:
        run.trainer.cache.planned = planned.work
    tracked = trackers.TrackedRun(config.record_file.parent, config.plain(), config["wandb_project"])
    with (
        trackers.reports(names if processes.main else (), tracked) as report,
        _unfinished(run, fingerprint(made_of), saved=saved),
    ):
        results = _fit_and_evaluate(run, report, began, saved=saved, main=processes.main)
        if planned is not None:  # process 0 writes
            made_of |= {"passport": run.passport, "histories_sha256": run.test._dataset.histories.fingerprint}
            results.write(planned, processes=processes.size, **made_of)
            results.log(planned, log_file)
            for metric, value in results.record.rows[0].metrics.items():
                report("test", metric, 0, float(value), "step")
            results.log_reports()
    return results.as_dict()


@contextlib.contextmanager
def _unfinished(run: Run, made_of: str, *, saved: bool) -> Iterator[None]:
    """Let RecBole's trainer save its state between epochs, from which the same run goes on if it is killed before the end.

    Args:
        made_of: names the code and the data.
        saved: whether anything is saved.
    """
    trainer, config = run.trainer, run.config
    if not saved or trainer.recommender.trained_in_stages or not trainer.is_resumable:
        yield
        return
    folder = Path(config["checkpoint_dir"]) / "unfinished" / f"{config.record_file.parent.name}-{made_of[:8]}"
    with only_one(folder) as held:  # the same run in another process has it else
        if held:
            folder.mkdir(exist_ok=True)
            trainer.scratch = folder
        yield
        if held:
            shutil.rmtree(folder)


def _check_processes(config: LLMConfig, processes: Processes) -> None:
    """Set ``fsdp`` as the launcher has it unless it is given; refuse keys that contradict the number of processes."""
    if processes.size > 1 and "gpu_id" in config.external_config_dict:
        raise ValueError(
            f"gpu_id: {config['gpu_id']} is for one process; for {processes.size}, set CUDA_VISIBLE_DEVICES, or give accelerate "
            "launch --gpu_ids"
        )
    if "fsdp" not in config.external_config_dict:
        config["fsdp"] = asks_for_fsdp(os.environ)
    if config["fsdp"] and processes.size == 1:
        raise ValueError(
            "fsdp: True spreads the LM over the processes of a run, but there is one; start several with accelerate launch or "
            "torchrun, or give fsdp: False"
        )


def _fit_and_evaluate(run: Run, report: trackers.Reports, began: float, *, saved: bool, main: bool) -> RunResults:
    """Train an assembled run, evaluate all variants and generate answers; ``began`` is a time of the monotonic clock."""
    config, trainer = run.config, run.trainer
    journal = trainer.scratch and trainer.scratch / "curve.jsonl"
    with curves.reporting(report, config["valid_metric"]), curves.recording(config["model"], journal) as curve:
        best_valid_score, best_valid_result = trainer.fit(
            run.train, run.valid, saved=saved, show_progress=config["show_progress"]
        )
    trained, validating = time.monotonic() - trainer.cache.waited, trainer.waited

    record = RunRecord(config, trainer, run.valid, run.test)
    testing = evaluate_variants(run, record, saved=saved, main=main)
    waited = trainer.cache.waited + trainer.waited
    earlier = trainer.earlier + trainer.cache.earlier  # of runs that were killed
    seconds = {
        "train": trained - validating - began + earlier,
        "evaluate": time.monotonic() - waited - (trained - validating),
        "waited": waited,
    }

    ranks = {row.name: row.ranks for row in record.rows}
    with metered() as generating:
        published = generated.evaluate(config, trainer.recommender, run.candidates.get("test"), ranks)
    measured = {TRAINING: trainer.training, VALIDATION: trainer.validation, TEST: testing, ANSWERS: generating}
    return RunResults(
        config=config,
        trainer=trainer,
        record=record,
        best_valid_score=best_valid_score,
        best_valid_result=best_valid_result,
        published=published,
        curve=curve,
        seconds=seconds,
        measured={**trainer.cache.measured, **measured},
    )


def evaluate_variants(run: Run, record: RunRecord, *, saved: bool, main: bool) -> Measured:
    """Add the row of the model and those beside it; returns what they have cost. Process 0 (``main``) saves predictions.

    Rows that another run computes at present come last, so that runs that share rows share the work.
    """
    config, trainer = run.config, run.trainer
    own, *others = trainer.recommender.variants().items()
    rows = dict([(config["model"], own[1]), *others])  # records know the model's row by its name in the configuration
    writer, waited, left = predictions.saved(config, run.test) if main else contextlib.nullcontext(), trainer.waited, [*rows]
    planned = trainer.cache.planned.get(TEST, 0) // len(rows)
    with writer as trainer.predictions, metered() as testing:
        while left:
            name = next((name for name in left if trainer.is_free(run.test, rows[name])), left[0])
            left.remove(name)
            if trainer.predictions is not None:
                trainer.predictions.start(name)
            options = {"load_best_model": saved and not record.rows, "show_progress": config["show_progress"]}
            with metered() as own, shown(f"evaluation, {name}", own, planned):
                result = trainer.evaluate(run.test, variant=rows[name], **options)
            record.add(name, result, reranked=rows[name].reranked)
    record.rows.sort(key=lambda row: [*rows].index(row.name))
    trainer.predictions = None
    testing.seconds -= trainer.waited - waited
    return testing


@dataclass(frozen=True)
class Run:
    """The parts of a run before training.

    Attributes:
        candidates: by phase; a phase of full ranking has no set.
        passport: as :func:`~recbole_llm.evaluation.known_splits.identify`.
    """

    config: LLMConfig
    model: Any
    trainer: Any
    train: Any
    valid: Any
    test: Any
    candidates: Mapping[str, CandidateSet]
    retriever: Retriever | None
    stages: Sequence[Stage]
    passport: Mapping[str, Any]

    def plan(self, named: Card | None = None, *, patient: bool = False) -> Plan:
        """What the run costs; arguments as :func:`~recbole_llm.planner.plan_of`."""
        data = self.train, self.valid, self.test
        with preserved_random_state(), alone(), contextlib.ExitStack() as stack:  # a run's results do not depend on its plan
            stack.enter_context(counting(EXACT if patient else EXACT // 5))
            if named is None:
                stack.enter_context(trials(2.0) if patient else trials(0.5, worth=100))
            return plan_of(self.trainer, self.stages, *data, self.retriever, named, patient=patient)


def assemble(config: LLMConfig, *, loads: bool = True) -> Run:
    """Read the data, draw the candidates, build the model and plan its stages, without training.

    Args:
        loads: refuse an LM that this machine cannot load.
    """
    slices.check(config["slices"])
    init_seed(config["seed"], config["reproducibility"])
    data = create_dataset(config)
    for source in dict.fromkeys(config.unread.values()):
        keys = ", ".join(key for key, given in config.unread.items() if given == source)
        logger.warning(f"settings of other models in {source}, which change nothing: {keys}")
    if others := config.of_other_training:
        keys = ", ".join(key + (f" (it has {', '.join(own)})" if own else "") for key, own in others.items())
        logger.warning(f"settings of RecBole's trainer, which does not train {config['model']}, change nothing: {keys}")
    if config.own_copy:
        logger.info(f"{config['dataset']}: your data is used, not the data of this name that comes with RecBole")
    logger.info(logs.dataset_line(data))
    for odd in data.odd_times:
        where = f"{config['dataset']}.inter, column {config['TIME_FIELD']}"
        logger.warning(f"{where}: {odd}; they order the histories wrongly: correct them, or remove the rows")
    for line in split_lines(config, data):
        logger.info(line)
    whole = data.interactions
    train, valid, test = data_preparation(config, data)
    passport = identify(config, data, whole, {"valid": valid._dataset, "test": test._dataset})
    logger.info(f"split: {passport['verdict']}")
    retriever = Retriever(config, data.histories) if config["candidates"]["source"] == "retriever" else None
    candidates = candidate_sets(config, data, retriever)
    valid.candidates, test.candidates = candidates.get("valid"), candidates.get("test")
    valid.users, test.users = (ranked_users(config, data.histories, phase) for phase in ("valid", "test"))

    init_seed(config["seed"], config["reproducibility"])  # the initial weights must not depend on earlier draws
    model = building.build(config, train._dataset)
    trainer = trainer_class(config)(config, model)
    check_shared(trainer, config["model"])
    logger.info(logs.model_line(model))
    trainer.eval_collector.data_collect(train)  # raises if a metric needs what the data lacks
    generated.check(config, trainer.recommender, candidates.get("test"))
    stages = trainer.plan(candidates, retriever)
    backbone = trainer.recommender.backbone
    width = 0 if backbone is None else backbone.outline.config.get_text_config().hidden_size
    set_precision(config["float32_matmul_precision"], torch.device(config["device"]), width)
    if loads and backbone is not None:
        backbone.check_loadable()
    return Run(config, model, trainer, train, valid, test, candidates, retriever, stages, passport)


def plan_run(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] = (),
    device: str | None = None,
) -> Plan:
    """The plan of :func:`run_recbole_llm` with the same arguments; nothing is trained, and no weights are read.

    Args:
        device: a card of :data:`~recbole_llm.costs.devices.CARDS`; None: this machine, which is measured.
    """
    named = card(device) if device else None
    config = LLMConfig(model, dataset, config_file_list, config_dict, cmd_line)
    if named:
        config = LLMConfig(model, dataset, config_file_list, {**(config_dict or {}), **on_card(config, named)}, cmd_line)
    logs.init_logging(config)
    run = assemble(config, loads=False)
    _warn_of_idle(run)
    return run.plan(named, patient=True)


def idle(run: Run, given: Mapping[str, Any], phases: Collection[str] = ("valid", "test")) -> dict[str, str]:
    """The given keys of the evaluation that change nothing in these phases, with what they are for."""
    config, ranker = run.config, getattr(run.model, "llm", run.model)  # of a cascade, its LLM ranker
    drawn, full = (any(phase in config[f"{kind}_phases"] for phase in phases) for kind in ("candidate", "full"))
    ranks, fits = hasattr(ranker, "reranks"), "valid" in phases
    retrieves = (drawn and run.retriever is not None) or isinstance(getattr(ranker, "retriever", None), Retriever)
    seeds = fits or config["eval_users"] is not None  # a run also draws scenarios and ties by candidates.seed
    saves = config["save_predictions"] and "test" in config["full_phases"]
    generates = config["scoring"] == "published" and run.trainer.recommender.published is not None
    acting = {
        "candidates": (drawn or (seeds and "seed" in (given.get("candidates") or ())), "rankings of candidates"),
        "mask_history": (full or (fits and hasattr(run.model, "parts")), "full rankings"),  # ours validate by some, too
        **dict.fromkeys(Retriever.KEYS, (retrieves, "candidates of source: retriever, and for LLM rankers in a full ranking")),
        "retriever_top": (ranks and ranker.reranks, "LLM rankers in a full ranking"),
        "predictions_topk": (saves, "save_predictions in a full ranking"),
        "published_max_new_tokens": (generates, "scoring: published"),
        **dict.fromkeys(("scorer", "normalize", "shuffled_title_control"), (ranks, "LLM rankers")),
    }
    return {key: what for key, (acts, what) in acting.items() if key in given and not acts}


def _warn_of_idle(run: Run) -> None:
    found = idle(run, {key: value for key, value in run.config.external_config_dict.items() if key not in run.config.unread})
    if found:
        logger.warning("settings that change nothing here: " + "; ".join(f"{key} (for {what})" for key, what in found.items()))
