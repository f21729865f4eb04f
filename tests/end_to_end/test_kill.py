"""A run that is killed at any moment and started again ends with the record and the weights of one that was not.

Every killed run is a fork of this process, so that RecBole, torch and transformers are imported once. It dies of
SIGKILL, which no code can catch, in place of a certain call; or from outside, wherever it happens to be.
"""

import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.files import sha256_file
from recbole_llm.training.loop import TrainingLoop

pytestmark = pytest.mark.slow

STEP, SAVE = "recbole_llm.training.loop:TrainingLoop._step", "recbole_llm.training.loop:TrainingLoop._save"
MOMENTS = {  # the call that the process does not live to make: which function, which call, of what path
    "candidates are written": ("os:replace", 1, "tiny.test"),
    "base spirit: a step": (STEP, 7, ""),
    "base spirit: a save is renamed": ("os:replace", 1, "step-5"),
    "base spirit: the save before is removed": ("shutil:rmtree", 1, "step-5"),
    "base spirit: its result is renamed": ("os:replace", 1, "base-spirit-"),
    "ingredient: between a step and its save": (SAVE, 19, ""),
    "ingredient: a validation": ("recbole_llm.model.eval_users:EvalUsers.score", 2, ""),
    "ingredient: the last step": (STEP, 28, ""),
    "cocktail: the entropy is measured": ("recbole_llm.model.merges.stages:candidate_entropy", 4, ""),
    "cocktail: the mixture is renamed": ("os:replace", 1, "merged"),
    "evaluation": ("recbole_llm.classical.trainer:ProtocolTrainer._candidate_scores", 2, ""),
    "a control is evaluated": ("recbole_llm.classical.trainer:ProtocolTrainer._candidate_scores", 4, ""),
    "the record is renamed": ("os:replace", 1, "record.json"),
}
EPOCH = "recbole.trainer.trainer:Trainer._train_epoch"
# of the others, what all have in common is left out: saves, renamed results, rows of candidates
ALLMREC_MOMENTS = {
    "collaborative model: between two epochs": (EPOCH, 2, ""),
    "collaborative model: its checkpoint is renamed": ("os:replace", 1, "SASRec-"),
    "alignment: a step": (STEP, 4, ""),
    "alignment: between a step and its save": (SAVE, 5, ""),
    "between alignment and projection": ("os:replace", 1, "alignment-"),
    "projection: its first step": (STEP, 7, ""),
    "projection: a later step": (STEP, 9, ""),
    "projection: a validation": ("recbole_llm.model.eval_users:EvalUsers.score", 3, ""),
}
RESUMES = {  # moments at which a training has a save to resume from
    "alignment: a step",
    "alignment: between a step and its save",
    "between alignment and projection",
    "projection: a later step",
    "projection: a validation",
}
VALID = "recbole_llm.model.encoder:LLMEncoder.valid_score"
BATCH = "recbole_llm.classical.trainer:ProtocolTrainer._full_sort_batch_eval"
LASER_MOMENTS = {  # phase 1 has 8 steps, 4 an epoch; the item matrix is new before steps 0, 3, 6; phase 2 has 4, plan apart
    "phase 1: a step in an epoch, between two refreshes": (STEP, 6, ""),
    "phase 1: the item matrix is encoded anew": ("recbole_llm.model.laser.towers:TowerReader.encode_items", 4, ""),
    "phase 1: between a step with a refresh and its save": (SAVE, 4, ""),
    "phase 1: a validation": (VALID, 2, ""),
    "between the phases": ("os:replace", 1, "phase-1-"),
    "phase 2: a step": (STEP, 11, ""),
    "evaluation": (BATCH, 2, ""),
}
WEAVE_MOMENTS = {  # two views, so two hybrids and two single-domain controls, of 12 to 28 steps
    "a hybrid: a step": (STEP, 22, ""),
    "data merging: its result is renamed": ("os:replace", 1, "lora-tiny+tiny-comedy+tiny-drama-"),
}
VARIABLE = {"checksum", "seconds", "users_per_second", "peak_memory_bytes", "written", "stage_seconds", "config", "plan"}


@pytest.fixture
def cpu_settings(settings) -> dict[str, Any]:
    return {**settings, "use_gpu": False, "save_every_seconds": 0}


@pytest.fixture(scope="module")
def whole(module_settings) -> tuple[dict[str, Any], dict[str, str], float]:
    """What an uninterrupted run leaves: its record, its files, its seconds."""
    began = time.monotonic()
    record = run({**module_settings, "use_gpu": False})
    return record, files(module_settings), time.monotonic() - began


def run(settings: dict[str, Any], model: str = "LoRACocktail") -> dict[str, Any]:
    return json.loads(Path(run_recbole_llm(model, "tiny", config_dict=settings)["record"]).read_text())


def files(settings: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file of the stages; what is unfinished or left over is there under its name, too."""
    folder = Path(settings["checkpoint_dir"]) / "stages"
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): sha256_file(path) for path in found}


def die_before(target: str, call: int, name: str) -> None:
    """Make this process die in place of the ``call``-th call whose last argument is a path named ``name...``."""
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *classes, function = path.split(".")
    for attribute in classes:
        owner = getattr(owner, attribute)
    original, calls = getattr(owner, function), count(1)

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if (not name or Path(arguments[-1]).name.startswith(name)) and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, function, dying)


def fork(settings: dict[str, Any], prepare: Callable[[], None], model: str = "LoRACocktail") -> Any:
    def child() -> None:
        prepare()
        run(settings, model)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def killed(settings: dict[str, Any], moment: tuple[str, int, str], model: str = "LoRACocktail") -> None:
    process = fork(settings, lambda: die_before(*moment), model)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the moment never came"


def constant(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in VARIABLE}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_that_is_started_again_ends_as_an_uninterrupted_one(cpu_settings, whole, moment, caplog):
    killed(cpu_settings, MOMENTS[moment])
    assert not list(Path(cpu_settings["checkpoint_dir"]).glob("runs/*/record.json"))
    with caplog.at_level("INFO"):
        record = run(cpu_settings)
    assert constant(record) == constant(whole[0]) and files(cpu_settings) == whole[1]
    # nothing is trained twice: where a training was killed, it resumes from its last save
    in_training = moment.startswith(("base spirit", "ingredient"))
    assert sum("resuming from step" in message for message in caplog.messages) == in_training


def test_of_several_killed_runs_each_resumes_where_the_last_one_died(cpu_settings, whole):
    killed(cpu_settings, (STEP, 7, ""))  # after 6 of the base spirit's 12 steps
    killed(cpu_settings, (STEP, 11, ""))  # after the other 6 and 4 of the ingredient's 16
    killed(cpu_settings, ("os:replace", 1, "merged"))
    record = run(cpu_settings)
    assert record["stage_seconds"]["ingredient"] == 0.0 < record["stage_seconds"]["cocktail"]
    assert constant(record) == constant(whole[0]) and files(cpu_settings) == whole[1]


def test_killed_from_outside_wherever_it_is(cpu_settings, whole):
    for _ in range(6):
        process = fork(cpu_settings, lambda: None)
        process.join(0.4 * whole[2])
        process.kill()
        process.join()
    assert constant(run(cpu_settings)) == constant(whole[0]) and files(cpu_settings) == whole[1]


def test_killed_while_the_builtin_lm_is_trained(cpu_settings, tmp_path):
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 4000, "batch_tokens": 256, "vocab_size": 300}
    settings = {**cpu_settings, "llm_path": "builtin", "builtin_lm": small}
    untouched = {**settings, "checkpoint_dir": str(tmp_path / "untouched")}
    killed(settings, (STEP, 5, ""), "TALLRec")
    assert constant(run(settings, "TALLRec")) == constant(run(untouched, "TALLRec"))
    # an adapter's config names the folder of its base model, and so where it stands: weights are compared
    weights = [{name: digest for name, digest in files(some).items() if ".safetensors" in name} for some in (settings, untouched)]
    assert weights[0] == weights[1] and len(weights[0]) == 2  # the builtin LM and its adapter


# -- adapters that several targets share -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_weave(module_settings) -> tuple[dict[str, Any], dict[str, str]]:
    settings = {**module_settings, "use_gpu": False, "checkpoint_dir": f"{module_settings['checkpoint_dir']}/weave"}
    return run(settings, "WeaveRec"), files(settings)


@pytest.mark.parametrize("moment", WEAVE_MOMENTS)
def test_a_killed_weave_ends_as_an_uninterrupted_one(cpu_settings, whole_weave, moment):
    killed(cpu_settings, WEAVE_MOMENTS[moment], "WeaveRec")
    assert not list(Path(cpu_settings["checkpoint_dir"]).glob("runs/*/record.json"))
    assert constant(run(cpu_settings, "WeaveRec")) == constant(whole_weave[0]) and files(cpu_settings) == whole_weave[1]


# -- a frozen LM and a frozen collaborative model ----------------------------------------------------------------------


def allmrec(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Three epochs of SASRec, then six steps of alignment and four of projection."""
    return {**settings, "use_gpu": False, "cf_config": {**settings["cf_config"], "epochs": 3}, **changes}


@pytest.fixture(scope="module")
def whole_allmrec(module_settings) -> tuple[dict[str, Any], dict[str, str]]:
    settings = allmrec(module_settings, checkpoint_dir=f"{module_settings['checkpoint_dir']}/allmrec")
    return run(settings, "ALLMRec"), files(settings)


@pytest.mark.parametrize("moment", ALLMREC_MOMENTS)
def test_a_killed_allmrec_ends_as_an_uninterrupted_one(cpu_settings, whole_allmrec, moment, caplog):
    settings = allmrec(cpu_settings)
    killed(settings, ALLMREC_MOMENTS[moment], "ALLMRec")
    assert not list(Path(settings["checkpoint_dir"]).glob("runs/*/record.json"))
    with caplog.at_level("INFO"):
        record = run(settings, "ALLMRec")
    assert constant(record) == constant(whole_allmrec[0]) and files(settings) == whole_allmrec[1]
    assert sum("resuming from step" in message for message in caplog.messages) == (moment in RESUMES)


def test_killed_in_every_stage_of_the_same_run(cpu_settings, whole_allmrec):
    settings = allmrec(cpu_settings)
    for moment in ((EPOCH, 3, ""), ("os:replace", 1, "builtin-text-encoder-"), (STEP, 3, ""), (STEP, 5, ""), (STEP, 3, "")):
        killed(settings, moment, "ALLMRec")
    assert constant(run(settings, "ALLMRec")) == constant(whole_allmrec[0]) and files(settings) == whole_allmrec[1]


def test_a_collaborative_model_trained_beside_a_new_or_a_cached_builtin_lm_is_the_same(cpu_settings, tmp_path):
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 4000, "batch_tokens": 256, "vocab_size": 300}
    settings = allmrec(cpu_settings, llm_path="builtin", builtin_lm=small)
    untouched = {**settings, "checkpoint_dir": str(tmp_path / "untouched")}
    killed(settings, (EPOCH, 2, ""), "ALLMRec")
    assert constant(run(settings, "ALLMRec")) == constant(run(untouched, "ALLMRec")) and files(settings) == files(untouched)


# -- two towers, of which one stands still between two refreshes -------------------------------------------------------


def laser(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The whole catalogue is ranked, as published; refreshes and epochs do not fall together; late steps are the best."""
    full = {"eval_args": {"mode": "full"}, "metrics": ["Recall", "NDCG", "MRR"], "topk": [10], "valid_metric": "NDCG@10"}
    rates = {"phase1_learning_rate": 2e-2, "phase2_learning_rate": 1e-3, "seed": 2022}
    return {**settings, **full, **rates, "use_gpu": False, "refresh_steps": 3, "m_former_dropout": 0.1, **changes}


@pytest.fixture(scope="module")
def whole_laser(module_settings) -> tuple[dict[str, Any], dict[str, str]]:
    settings, states = laser(module_settings, checkpoint_dir=f"{module_settings['checkpoint_dir']}/laser"), []
    with pytest.MonkeyPatch.context() as patch:
        trains = TrainingLoop.run
        patch.setattr(TrainingLoop, "run", lambda loop: states.append(trains(loop)))
        record = run(settings, "Laser")
    assert [(state.step, state.best_step) for state in states] == [(8, 8), (4, 3)]  # else a step could be lost unseen
    return record, files(settings)


@pytest.mark.parametrize("moment", LASER_MOMENTS)
def test_a_killed_laser_ends_as_an_uninterrupted_one(cpu_settings, whole_laser, moment, caplog):
    settings = laser(cpu_settings)
    killed(settings, LASER_MOMENTS[moment], "Laser")
    assert not list(Path(settings["checkpoint_dir"]).glob("runs/*/record.json"))
    with caplog.at_level("INFO"):
        record = run(settings, "Laser")
    assert constant(record) == constant(whole_laser[0]) and files(settings) == whole_laser[1]
    in_training = moment.startswith(("phase", "between"))
    assert sum("resuming from step" in message for message in caplog.messages) == in_training


def test_laser_killed_in_both_phases_of_the_same_run(cpu_settings, whole_laser):
    settings = laser(cpu_settings)
    killed(settings, (STEP, 5, ""), "Laser")  # after 4 steps of phase 1
    killed(settings, (SAVE, 3, ""), "Laser")  # after 3 more, the last of which is not saved
    killed(settings, (STEP, 5, ""), "Laser")  # after the other 2, and 2 of phase 2
    killed(settings, (VALID, 2, ""), "Laser")  # the first one is that of the weights before phase 2
    assert constant(run(settings, "Laser")) == constant(whole_laser[0]) and files(settings) == whole_laser[1]
