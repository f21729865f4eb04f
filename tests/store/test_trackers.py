"""What is reported where, once, and without an effect on the run."""

from __future__ import annotations

import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_llm.store import trackers
from recbole_llm.store.trackers import TrackedRun, chosen, reports


def run_of(folder: Path) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return TrackedRun(folder, {"learning_rate": 0.1, "prompt": "x" * 7000}, "recbole")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Store:
    """What a stand-in of wandb or mlflow was told."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Any]] = {}
        self.ended: list[tuple[str, Any]] = []
        self.axes: list[tuple[str, Any]] = []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Store:
    store, module = Store(), ModuleType("wandb")

    def init(*, project: str, name: str, dir: str, id: str | None = None, resume: str | None = None) -> Any:
        random.random()  # names are drawn
        key = id or f"{project}/{name}/{len(store.runs)}"
        points = store.runs.setdefault(key, [])
        return SimpleNamespace(
            id=key,
            config=SimpleNamespace(update=lambda values, allow_val_change: points.append(dict(values))),
            log=points.append,
            define_metric=lambda name, **axis: store.axes.append((name, axis.get("step_metric"))),
            finish=lambda exit_code: store.ended.append((key, exit_code)),
        )

    vars(module).update(run=None, init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return store


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Store:
    store, module = Store(), ModuleType("mlflow")
    open_run: list[str] = []

    def start_run(run_id: str | None = None, run_name: str | None = None) -> None:
        open_run.append(run_id or f"{run_name}/{len(store.runs)}")
        store.runs.setdefault(open_run[-1], [])

    def active_run() -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=open_run[-1])) if open_run else None

    vars(module).update(
        start_run=start_run,
        active_run=active_run,
        log_params=lambda values: store.runs[open_run[-1]].append(dict(values)),
        log_metric=lambda name, value, step: store.runs[open_run[-1]].append((name, value, step)),
        end_run=lambda status: store.ended.append((open_run.pop(), status)),
        utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)),
        __spec__=ModuleSpec("mlflow", None),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return store


# -- which trackers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [("none", ()), (None, ()), ([], ()), (["none"], ()), ("tensorboard", ("tensorboard",)), (["tensorboard"], ("tensorboard",))],
)
def test_names_are_those_of_transformers(given: Any, names: tuple[str, ...]) -> None:
    assert chosen(given) == names


def test_all_are_those_that_are_installed(wandb: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "mlflow")
    assert chosen("all") == ("tensorboard", "wandb")


def test_recboles_own_key_for_wandb(wandb: Store) -> None:
    assert chosen("none", log_wandb=True) == ("wandb",)
    assert chosen(["wandb", "tensorboard"], log_wandb=True) == ("wandb", "tensorboard")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none", "wandb"], "report_to: .* has none beside other names; give none alone"),
        (["all", "wandb"], "report_to: .* has all beside other names"),
        ("comet_ml", "report_to: 'comet_ml' is unknown; choose tensorboard, wandb, mlflow, all or none"),
        ("mlflow", "report_to: mlflow needs the package mlflow, which is not installed; run: pip install mlflow"),
    ],
)
def test_what_cannot_be_reported_is_refused(given: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "mlflow")
    with pytest.raises(ValueError, match=message):
        chosen(given)


# -- points ------------------------------------------------------------------------------------------------------------


def test_tensorboard_has_each_point_once_after_a_kill(tmp_path: Path) -> None:
    run = run_of(tmp_path / "TALLRec-tiny-1234")
    with pytest.raises(KeyError), reports(["tensorboard"], run) as report:
        report("ingredient", "loss", 1, 3.0, "step")
        report("ingredient", "loss", 2, 2.0, "step")
        report("ingredient", "valid NDCG@10", 2, 0.25, "step")
        raise KeyError
    with reports(["tensorboard"], run) as report:
        report("ingredient", "loss", 2, 2.0, "step")
        report("ingredient", "loss", 3, 1.0, "step")
    assert scalars(run.folder / "tensorboard") == {
        "ingredient/loss": [(1, 3.0), (2, 2.0), (3, 1.0)],
        "ingredient/valid NDCG@10": [(2, 0.25)],
    }
    assert not (run.folder / trackers.STATE).exists()


def test_a_complete_run_that_is_repeated_begins_its_curve_anew(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    for value in (3.0, 2.0):
        with reports(["tensorboard"], run) as report:
            report("SASRec", "loss", 0, value, "epoch")
    assert scalars(run.folder / "tensorboard") == {"SASRec/loss": [(0, 3.0)]}, "the stages of the second one may be reused"
    assert scalars(run.folder / "tensorboard-2") == {"SASRec/loss": [(0, 2.0)]}
    with pytest.raises(KeyError), reports(["tensorboard"], run) as report:
        raise KeyError
    with reports(["tensorboard"], run) as report:
        report("SASRec", "loss", 0, 1.0, "epoch")
    assert scalars(run.folder / "tensorboard-3") == {"SASRec/loss": [(0, 1.0)]}, "killed and continued, it is one"


def test_the_folder_of_transformers_variable_has_one_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    with reports(["tensorboard"], run_of(tmp_path / "run")) as report:
        report("SASRec", "loss", 0, 1.0, "epoch")
    assert scalars(tmp_path / "boards" / "run") == {"SASRec/loss": [(0, 1.0)]}
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_and_mlflow_have_one_run_after_a_kill(tmp_path: Path, wandb: Store, mlflow: Store) -> None:
    run = run_of(tmp_path / "run")
    with pytest.raises(KeyError), reports(["wandb", "mlflow"], run) as report:
        report("ingredient", "valid NDCG@10", 1, 0.5, "step")
        raise KeyError
    with open(run.folder / trackers.STATE, "a") as file:
        file.write('{"stage": "ingr')  # the process was killed while it wrote
    with reports(["wandb", "mlflow"], run) as report:
        report("ingredient", "valid NDCG@10", 1, 0.5, "step")
        report("SASRec", "loss", 0, 2.0, "epoch")
    (told,) = wandb.runs.values()
    assert [points for points in told if "learning_rate" not in points] == [
        {"ingredient/valid NDCG@10": 0.5, "ingredient/step": 1},
        {"SASRec/loss": 2.0, "SASRec/epoch": 0},
    ]
    assert ("ingredient/*", "ingredient/step") in wandb.axes and ("SASRec/*", "SASRec/epoch") in wandb.axes
    assert [code for _, code in wandb.ended] == [1, 0]
    (told,) = mlflow.runs.values()
    assert told == [{"learning_rate": 0.1}, ("ingredient/valid NDCG_10", 0.5, 1), ("SASRec/loss", 2.0, 0)]
    assert [status for _, status in mlflow.ended] == ["FAILED", "FINISHED"]


def test_a_run_that_the_program_has_open_stays_open(tmp_path: Path, mlflow: Store) -> None:
    sys.modules["mlflow"].start_run(run_name="mine")
    with reports(["mlflow"], run_of(tmp_path / "run")) as report:
        report("SASRec", "loss", 0, 2.0, "epoch")
    assert ("SASRec/loss", 2.0, 0) in mlflow.runs["mine/0"] and not mlflow.ended


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, mlflow: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    run = run_of(tmp_path / "run")
    vars(sys.modules["mlflow"])["log_metric"] = fail
    with reports(["mlflow", "tensorboard"], run) as report:
        report("SASRec", "loss", 0, 2.0, "epoch")
        report("SASRec", "loss", 1, 1.0, "epoch")
    assert caplog.text.count("report_to: mlflow failed (ConnectionError: no route); nothing more is reported to it") == 1
    assert scalars(run.folder / "tensorboard") == {"SASRec/loss": [(0, 2.0), (1, 1.0)]}


def test_a_tracker_that_cannot_start_is_named_and_the_others_end(tmp_path: Path, mlflow: Store, wandb: Store) -> None:
    def fail(**kwargs: Any) -> None:
        raise PermissionError("api_key not configured")

    vars(sys.modules["wandb"])["init"] = fail
    refused = pytest.raises(ValueError, match="report_to: wandb cannot start: api_key not configured")
    with refused, reports(["mlflow", "wandb"], run_of(tmp_path / "run")):
        raise AssertionError("nothing is trained")
    assert [status for _, status in mlflow.ended] == ["FAILED"]


def test_random_numbers_of_the_run_are_those_without_reports(tmp_path: Path, wandb: Store) -> None:
    def drawn(names: list[str]) -> tuple[float, ...]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        with reports(names, run_of(tmp_path / "run")) as report:
            report("SASRec", "loss", 0, 2.0, "epoch")
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(["wandb", "tensorboard"]) == drawn([])


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with reports([], run_of(tmp_path / "run")) as report:
        report("SASRec", "loss", 0, 2.0, "epoch")
    assert not [*(tmp_path / "run").iterdir()]


# -- the packages themselves, where they are installed -----------------------------------------------------------------


def test_a_local_store_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    module.set_tracking_uri((tmp_path / "store").as_uri())
    run = run_of(tmp_path / "run")
    with pytest.raises(KeyError), reports(["mlflow"], run) as report:
        report("ingredient", "valid NDCG@10", 1, 0.5, "step")
        raise KeyError
    with reports(["mlflow"], run) as report:
        report("ingredient", "valid NDCG@10", 2, 0.75, "step")
    client = module.MlflowClient()
    (found,) = client.search_runs(["0"])
    assert found.info.run_name == "run" and found.info.status == "FINISHED" and found.data.params == {"learning_rate": "0.1"}
    history = client.get_metric_history(found.info.run_id, "ingredient/valid NDCG_10")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.75)]


def test_an_offline_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with reports(["wandb"], run_of(tmp_path / "run")) as report:
        report("ingredient", "loss", 1, 0.5, "step")
    assert [*(tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]
