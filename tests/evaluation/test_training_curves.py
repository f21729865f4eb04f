"""The curves of a run: beside its record, in a tracker, and without an effect on either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_llm.evaluation import training_curves
from recbole_llm.evaluation.training_curves import write_curves
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.curves import Curve


def run(name: str, settings: dict[str, Any], **changes: Any) -> tuple[Path, dict[str, Any]]:
    path = Path(run_recbole_llm(name, "tiny", config_dict={**settings, **changes})["record"])
    return path, json.loads(path.read_text())


def reported(record: Path) -> dict[str, list[list[float]]]:
    """[step, value] by tag."""
    events = EventAccumulator(str(record.parent / "tensorboard"))
    events.Reload()
    return {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_stages_are_reported_while_they_are_trained_and_shown_when_they_are_reused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = training_curves.draw

    def noted(file: Path, curves: Sequence[Curve], title: str) -> None:
        drawn.append({curve.name for curve in curves})
        draw(file, curves, title)

    monkeypatch.setattr(training_curves, "draw", noted)
    path, record = run("TALLRec", settings, report_to=["tensorboard"])
    curves = json.loads((path.parent / "curves.json").read_text())
    adapter, points = curves["ingredient"], curves["ingredient"]["points"]
    assert {*curves} == {"ingredient"} and adapter["unit"] == "step" and {*points} == {"loss", "valid NDCG@5"}
    assert [step for step, _ in points["loss"]] == [*range(1, 17)] and points["loss"][-1][1] < points["loss"][0][1]
    assert min(imread(path.parent / "curves.png").shape[:2]) > 200 and drawn == [{"ingredient"}]
    found = reported(path)
    for metric, own in points.items():
        assert found.pop(f"ingredient/{metric}") == [[step, pytest.approx(value, rel=1e-6)] for step, value in own]
    assert found == {f"test/{name}": [[0, pytest.approx(value)]] for name, value in record["results"]["TALLRec"].items()}
    assert {path.name for path in Path().iterdir()} == {"log", "saved"}  # no log_tensorboard

    shutil.rmtree(path.parent)
    again, repeated = run("TALLRec", settings, report_to="tensorboard")
    assert again == path and repeated["stages"] == record["stages"]
    assert repeated["results"] == record["results"] and repeated["ranks"] == record["ranks"]
    assert json.loads((path.parent / "curves.json").read_text()) == curves and drawn == 2 * [{"ingredient"}]
    assert not [tag for tag in reported(path) if tag.startswith("ingredient")]  # trained by the other run


def test_reports_change_no_name_and_no_result(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, without = run("SASRec", settings, epochs=2)
    shown, found = run("SASRec", settings, epochs=2, report_to="all", checkpoint_dir=str(tmp_path / "other"))
    assert plain.relative_to(tmp_path / "saved") == shown.relative_to(tmp_path / "other")
    assert found["fingerprint"] == without["fingerprint"]
    assert found["results"] == without["results"] and found["ranks"] == without["ranks"]
    assert not (plain.parent / "tensorboard").exists() and not Path("log_tensorboard").exists()
    curves = json.loads((plain.parent / "curves.json").read_text())
    assert curves == json.loads((shown.parent / "curves.json").read_text())
    assert curves["SASRec"]["unit"] == "epoch" and {*curves["SASRec"]["points"]} == {"loss", "valid NDCG@5"}
    assert [step for step, _ in curves["SASRec"]["points"]["loss"]] == [0, 1]
    assert reported(shown)["SASRec/valid NDCG@5"][-1][1] == pytest.approx(curves["SASRec"]["points"]["valid NDCG@5"][-1][1])


def test_a_package_that_is_missing_is_named_before_anything_is_read(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.store.trackers._is_installed", lambda name: name == "tensorboard")
    for given in ({"report_to": "wandb"}, {"log_wandb": True}):
        with pytest.raises(ValueError, match=rf"{[*given][0]}: wandb needs the package wandb, which is not installed"):
            run("SASRec", {**settings, "data_path": "nowhere"}, **given)
    assert not [*Path().iterdir()]


@pytest.mark.slow
def test_a_part_of_recbole_inside_a_run_is_a_stage_of_its_own(settings: dict[str, Any]) -> None:
    path, _ = run("ALLMRec", settings, cf_config={**settings["cf_config"], "epochs": 2})
    curves = json.loads((path.parent / "curves.json").read_text())
    assert [*curves] == ["cf-SASRec", "alignment", "projection"]
    assert [curve["unit"] for curve in curves.values()] == ["epoch", "step", "step"]


def test_nothing_is_drawn_of_what_has_no_two_points(tmp_path: Path) -> None:
    assert write_curves(tmp_path, {"merge": tmp_path / "stage"}, Curve("Pop"), "run") is None
    assert not [*tmp_path.iterdir()]
    assert write_curves(tmp_path, {}, Curve("BPR", "epoch", {"loss": [(0, 1.0)]}), "run") is None
    assert [path.name for path in tmp_path.iterdir()] == ["curves.json"]
