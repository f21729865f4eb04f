"""Laser as whole runs: one that is initialised from another, what it reports about its experts, the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.cli import main
from recbole_llm.evaluation import plots
from recbole_llm.quick_start import run_recbole_llm

Made = SimpleNamespace
ABOUT_MEASUREMENT = ("eval_args", "metrics", "topk", "valid_metric", "candidates")
METRICS = ["recall@10", "ndcg@10", "mrr@10", "mrr"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def settings(module_settings: dict[str, Any]) -> dict[str, Any]:
    """Tiny sizes and steps, of which both phases gain; measured is what Laser's own property file says: the whole catalogue."""
    own = {key: value for key, value in module_settings.items() if key not in ABOUT_MEASUREMENT}
    return {**own, "phase1_learning_rate": 1e-3, "phase2_learning_rate": 1e-3}


def run(settings: dict[str, Any], dataset: str = "tiny", **changes: Any) -> Made:
    result = run_recbole_llm("Laser", dataset, config_dict={**settings, **changes})
    path = Path(result["record"])
    return Made(result=result, record=json.loads(path.read_text()), folder=path.parent, stages=path.parents[2] / "stages")


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any]) -> Made:
    """The run from which others are initialised."""
    return run(settings)


@pytest.fixture(scope="module")
def from_run(settings: dict[str, Any], trained: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that is initialised from that one; its own are where its data are and what their columns mean."""
    own = {key: settings[key] for key in ("data_path", "show_progress", "year_field", "category_field")}
    return {**own, "init_from": str(trained.folder), "checkpoint_dir": str(tmp_path_factory.mktemp("zero-shot"))}


@pytest.fixture(scope="module")
def zero_shot(from_run: dict[str, Any]) -> Made:
    return run(from_run, "other")


@pytest.fixture(scope="module")
def loaded(from_run: dict[str, Any], zero_shot: Made, assemble: Callable[..., Made]) -> Made:
    """The model of that run, whose stages are cached."""
    return finished(assemble("Laser", from_run, "other"))


def finished(made: Made) -> Made:
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    made.model.eval()
    return made


def equal(tower: torch.nn.Module, file: Path) -> bool:
    one, other = tower.state_dict(), load_file(file)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def histories(made: Made) -> list[list[int]]:
    return [
        made.model.parts.histories.before(user, "test").tolist() for user in made.model.parts.histories.evaluated("test").tolist()
    ]


# -- initialised from another run ----------------------------------------------------------------------------------------


def test_on_another_dataset_nothing_is_computed_but_its_own_control_and_an_item_matrix(zero_shot: Made, trained: Made) -> None:
    assert list(trained.record["stages"]) == ["cf-SASRec", "phase-1", "phase-2"]
    assert list(zero_shot.record["stages"]) == ["cf-SASRec", "item-matrix"]
    assert zero_shot.record["stages"]["cf-SASRec"] != trained.record["stages"]["cf-SASRec"]
    folders = [folder.name for folder in zero_shot.stages.iterdir() if folder.is_dir()]
    assert {*folders} >= {*zero_shot.record["stages"].values()}
    assert {name.rpartition("-")[0] for name in folders} == {"cf-SASRec", "item-matrix"}
    assert list(zero_shot.record["results"]) == ["Laser", "SASRec"] and zero_shot.record["dataset"] == "other"


def test_its_towers_are_those_of_the_run_and_its_matrix_is_what_the_item_tower_says(loaded: Made, trained: Made) -> None:
    model, stages = loaded.model, trained.record["stages"]
    assert equal(model.towers.user, trained.stages / stages["phase-2"] / "user_tower.safetensors")
    assert equal(model.towers.item, trained.stages / stages["phase-1"] / "item_tower.safetensors")
    assert not equal(model.towers.user, trained.stages / stages["phase-1"] / "user_tower.safetensors")  # phase 2 did train
    assert model.item_matrix.shape == (model.n_items, 32) and not model.item_matrix[0].any()
    torch.testing.assert_close(model.item_matrix, model.encode_items())


@torch.no_grad()
def test_everybody_has_the_null_token_on_another_dataset(loaded: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded.model
    assert not model.reader.knows_states()
    before = model.encode_histories(histories(loaded)[:5])
    read = model.reader.states

    def disturbed(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        states, known = read(*arguments)
        return states + 1, known

    monkeypatch.setattr(model.reader, "states", disturbed)
    torch.testing.assert_close(model.encode_histories(histories(loaded)[:5]), before)


@torch.no_grad()
def test_states_of_another_space_are_read_where_that_is_asked_for(
    from_run: dict[str, Any], loaded: Made, trained: Made, assemble: Callable[..., Made]
) -> None:
    made = finished(assemble("Laser", from_run, "other", transfer_states=True))
    assert made.model.reader._has_state.sum() > 30
    assert equal(made.model.towers.user, trained.stages / trained.record["stages"]["phase-2"] / "user_tower.safetensors")
    assert made.trainer.cache.folders["cf-SASRec"] == loaded.trainer.cache.folders["cf-SASRec"]
    assert made.trainer.cache.folders["item-matrix"] != loaded.trainer.cache.folders["item-matrix"]
    interaction = next(iter(loaded.test))[0]
    scores = [model.full_sort_predict(interaction) for model in (loaded.model, made.model)]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_on_the_same_dataset_its_result_is_that_of_the_run(from_run: dict[str, Any], settings: Any, trained: Made) -> None:
    again = run(from_run, checkpoint_dir=settings["checkpoint_dir"], cf_config=settings["cf_config"])
    assert again.record["results"] == trained.record["results"] and again.record["ranks"] == trained.record["ranks"]
    assert list(again.record["stages"]) == ["cf-SASRec", "item-matrix"] and again.folder != trained.folder
    both = [run.stages / run.record["stages"][name] for run, name in ((again, "item-matrix"), (trained, "phase-1"))]
    matrices = [load_file(folder / "item_matrix.safetensors")["items"] for folder in both]
    torch.testing.assert_close(*matrices)


def test_on_the_same_dataset_another_collaborative_model_is_another_space(
    from_run: dict[str, Any], assemble: Callable[..., Made], trained: Made
) -> None:
    def reads_states(**changes: Any) -> bool:
        model = assemble("Laser", from_run, **changes).model
        return model._shares_the_space(model.cf.stage)

    assert reads_states() and not reads_states(cf_config={"epochs": 2})
    assert reads_states(cf_config={"epochs": 2}, transfer_states=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ALLMRec", "checksum": None}, "init_from: .* is a run of ALLMRec; give a run of Laser"),
        (
            {"stages": None, "checksum": None},
            r"init_from: .* is damaged: its stages are not names of folders; repeat the run \(--model=Laser",
        ),
        ({"config": None}, "init_from: .*record.json is no record of a run; give a run's folder"),
    ],
)
def test_a_run_that_nothing_can_be_initialised_from_is_refused_with_a_remedy(
    from_run: dict[str, Any], assemble: Any, trained: Made, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    record = {key: value for key, value in (trained.record | changes).items() if value is not None}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        assemble("Laser", from_run, "other", init_from=str(tmp_path))


@pytest.mark.parametrize("given", ["nowhere", "nowhere/record.json", "stages"])
def test_a_path_without_a_run_is_refused_by_the_key_that_names_it(
    from_run: dict[str, Any], assemble: Any, trained: Made, given: str
) -> None:
    path = str(trained.stages.parent / given)
    with pytest.raises(ValueError, match=f"init_from: there is no run at {path} .*; give a run's folder, as saved/runs/Laser-"):
        assemble("Laser", from_run, "other", init_from=path)


def test_a_run_that_has_trained_no_tower_or_lost_it_is_refused(
    from_run: dict[str, Any], assemble: Any, trained: Made, zero_shot: Made, tmp_path: Path
) -> None:
    has = r"\(it has: cf-SASRec, item-matrix\); give the run that trained it"
    with pytest.raises(ValueError, match=f"init_from: .* has no stage phase-1 {has}"):
        finished(assemble("Laser", from_run, "other", init_from=str(zero_shot.folder)))
    shutil.copytree(trained.folder, tmp_path / "saved" / "runs" / "lost")
    with pytest.raises(ValueError, match="init_from: the stage phase-1 of .* is missing or damaged .*repeat the run"):
        finished(assemble("Laser", from_run, "other", init_from=str(tmp_path / "saved" / "runs" / "lost")))


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["trained", "zero_shot"])
def test_every_test_user_is_named_with_an_expert_beside_the_record(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    pairs = json.loads((run.folder / "experts.json").read_text(), object_pairs_hook=list)
    assert sorted(user for user, _ in pairs) == sorted(run.record["ranks"]["Laser"]) and len(pairs) == 60
    assert {expert for _, expert in pairs} <= set(range(3)) and all(type(expert) is int for _, expert in pairs)
    assert (run.folder / "experts.png").read_bytes().startswith(PNG)
    assert not [file for file in run.folder.iterdir() if file.suffix == ".tmp"]


@torch.no_grad()
def test_the_experts_are_the_routers_and_the_picture_has_their_shares_by_category(
    settings: dict[str, Any], assemble: Any, trained: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = finished(assemble("Laser", settings))
    model, drawn = made.model, []
    monkeypatch.setattr(plots, "heat_map", lambda file, values, **labels: drawn.append((file, values, labels)))
    (line,) = model.report(tmp_path)
    ((file, values, labels),) = drawn
    assert str(file) == str(tmp_path / "experts.png") and line == f"experts of 60 users: {file}"
    written = json.loads((tmp_path / "experts.json").read_text())
    assert written == json.loads((trained.folder / "experts.json").read_text())
    for user in model.parts.histories.evaluated("test").tolist()[::7]:
        states, known = model.reader.states([model.parts.histories.before(user, "test").tolist()])  # [1, N, H], [1, N]
        p = model.towers.user.m_former.router(states[known]).softmax(-1)  # [N, K]
        assert written[model.parts.histories.user_ids[user]] == int(p.mean(0).argmax())
    counts = [int(row.split("(")[1].rstrip(")")) for row in labels["rows"]]
    assert sum(counts) == 60 and {row.split()[0] for row in labels["rows"]} <= {"comedy", "drama", "film"}
    np.testing.assert_allclose(values.sum(1), 1)
    np.testing.assert_allclose(np.array(counts) @ values, np.bincount([*written.values()], minlength=3))


@pytest.mark.parametrize("changes", [{"m_former": False}, {"moe": False}, {"prefix": False}])
def test_without_experts_there_is_nothing_to_report(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert assemble("Laser", settings, **changes).model.report(tmp_path / "run") == []
    assert not (tmp_path / "run").exists()


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_prints_laser_and_sasrec_in_one_table(
    settings: dict[str, Any], trained: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model=Laser", "--dataset=tiny", *(f"--{key}={value!r}" for key, value in settings.items())])
    printed = capsys.readouterr()
    table = (printed.out + printed.err).split("tiny, mode full, history masked, backbone: tiny-llama")[-1].split("run record:")[0]
    heading, ruler, *rows = table.splitlines()[1:]
    assert heading.split()[: len(METRICS)] == METRICS and set(ruler) <= {"-", " "}
    assert [row.split()[0] for row in rows] == ["Laser", "SASRec"]
    for row in rows:
        name, value, interval, *others = row.split()
        expected, shown = trained.record["results"][name], [value, *others][: len(METRICS)]
        assert [*map(float, shown)] == pytest.approx([expected[key] for key in METRICS], abs=1e-4)
        assert float(interval.removeprefix("±")) == pytest.approx(trained.record["half_width_95"][name]["recall@10"], abs=1e-3)


@pytest.mark.parametrize("arguments", [["--init_from=nowhere"], ["--init_from=."]])
def test_a_wrong_path_on_the_command_line_ends_in_one_line(
    settings: dict[str, Any], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model=Laser", "--dataset=tiny", f"--data_path={settings['data_path']}", *arguments])
    assert re.match(r"error: init_from: there is no run at [.\w]+ .*; give a run's folder", capsys.readouterr().err)
