"""A property file becomes tasks, and a task's record is where the run itself puts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.config.property_files import properties_folder
from recbole_llm.leaderboard.board import folder_of
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.task import Task
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import SHORTCUTS


def write(file: Path, **values: Any) -> Path:
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


PLAN: dict[str, Any] = {
    "dataset": "tiny",
    "seeds": [1, 2],
    "protocols": {"candidates": {}, "full": {"eval_args": {"mode": "full"}}},
    "settings": {"epochs": 3},
    "shortcuts": False,
    "models": {
        "Pop": None,
        "SASRec": {"config_files": "one.yaml two.yaml", "settings": {"epochs": 5}},
        "zero-shot": {"model": "TALLRec", "row": "no adapter", "protocols": ["candidates"]},
    },
}


def test_tasks_are_models_by_protocols_by_seeds_and_the_nearer_setting_wins(tmp_path: Path) -> None:
    tasks = read_plan(write(tmp_path / "plan.yaml", **PLAN), {"data_path": "here"})
    assert [(t.label, t.protocol, t.seed) for t in tasks] == [
        ("Pop", "candidates", 1),
        ("Pop", "candidates", 2),
        ("Pop", "full", 1),
        ("Pop", "full", 2),
        ("SASRec", "candidates", 1),
        ("SASRec", "candidates", 2),
        ("SASRec", "full", 1),
        ("SASRec", "full", 2),
        ("zero-shot", "candidates", 1),
        ("zero-shot", "candidates", 2),
    ]
    assert tasks[0].settings == {"epochs": 3, "data_path": "here"} and tasks[4].settings["epochs"] == 5
    assert tasks[2].arguments == [
        "--model=Pop",
        "--dataset=tiny",
        "--epochs=3",
        "--eval_args={'mode': 'full'}",
        "--data_path=here",
        "--seed=1",
    ]
    assert (tasks[-1].model, tasks[-1].row) == ("TALLRec", "no adapter")
    assert tasks[4].arguments[2] == "--config_files=one.yaml two.yaml"


def test_a_row_has_the_seeds_and_protocols_of_the_runs_that_it_shows(tmp_path: Path) -> None:
    """Otherwise a model would be trained with further seeds for another row of its runs alone."""
    own = {"settings": {"normalize": "mean", "note": "mine"}}
    row = {"model": "TALLRec", "row": "no adapter"}
    models = {
        "before": row,
        "TALLRec": {"seeds": [2], "protocols": ["candidates"]},
        "mean": {"model": "TALLRec", "seeds": [3, 4], **own},
        "of the mean": {**row, "settings": {"normalize": "mean"}},
        "own seeds": {**row, "seeds": [1]},
        "own runs": {**row, "settings": {"normalize": "pmi"}, "protocols": ["full"]},
    }
    tasks = read_plan(write(tmp_path / "plan.yaml", **{**PLAN, "models": models}))
    found = {label: [(t.protocol, t.seed) for t in tasks if t.label == label] for label in models}
    assert found["before"] == found["TALLRec"] == [("candidates", 2)]
    assert found["of the mean"] == found["mean"] and {seed for _, seed in found["mean"]} == {3, 4}
    models["last"] = {"model": "TALLRec", "settings": ["normalize"]}  # an entry that is read for the rows before it
    with pytest.raises(ValueError, match="`last`: settings: "):
        read_plan(write(tmp_path / "plan.yaml", **{**PLAN, "models": models}))
    assert found["own seeds"] == [("candidates", 1)] and found["own runs"] == [("full", 1), ("full", 2)]


@pytest.mark.parametrize("model", ["Pop", "BERT4Rec"])  # the latter puts keys into its configuration while it runs
def test_a_records_place_is_known_before_the_run(model: str, settings: dict[str, Any], tmp_path: Path) -> None:
    given = {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "epochs")}
    plan = {"dataset": "tiny", "seeds": [7], "settings": given, "models": {model: {}}, "shortcuts": False}
    (task,) = read_plan(write(tmp_path / "plan.yaml", **plan))
    result = run_recbole_llm(model, "tiny", cmd_line=[*task.arguments[2:], "--show_progress=False"])
    assert Path(result["record"]) == task.record


def test_the_files_of_a_leaderboard_are_below_the_checkpoint_dir_of_its_runs(tmp_path: Path) -> None:
    plain = write(tmp_path / "plan.yaml", **PLAN)
    own = write(tmp_path / "own.yaml", **{**PLAN, "settings": {"checkpoint_dir": "here"}})
    assert folder_of(plain, {}) == Path("saved/leaderboard/plan") and folder_of(own, {}) == Path("here/leaderboard/own")
    assert folder_of(own, {"checkpoint_dir": "there"}) == Path("there/leaderboard/own")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": {}}, "unknown key `modles`"),
        ({"seeds": None}, None),
        ({"models": {"Pop": {"setings": {}}}}, "unknown key `setings`"),
        ({"shortcuts": ["RecentPop"]}, r"shortcuts: \['RecentPop'\] is not True or False"),
        ({"models": {"Pop": ["epochs"]}}, r"plan\.yaml: models: {'Pop': \['epochs'\]} is not a dictionary of dictionaries"),
        ({"models": ["Pop"]}, r"models: \['Pop'\] is not a dictionary of dictionaries"),
        ({"models": {}}, "`models` is missing or empty"),
        ({"seeds": 2020}, "seeds: 2020 is not a list of whole numbers"),
        ({"seeds": ["a"]}, r"seeds: \['a'\] is not a list of whole numbers"),
        ({"dataset": 5}, "dataset: 5 is not a string"),
        ({"protocols": ["full"]}, r"protocols: \['full'\] is not a dictionary of dictionaries of settings"),
        ({"settings": [1]}, r"settings: \[1\] is not a dictionary of settings"),
        ({"models": {"Pop": {"settings": [1]}}}, r"plan\.yaml: `Pop`: settings: \[1\] is not a dictionary of settings"),
        ({"models": {"Pop": {"config_files": 5}}}, r"`Pop`: config_files: 5 is not a string or a list of strings"),
        ({"models": {"Pop": {"protocols": ["ful"]}}}, "`Pop` has an unknown protocol 'ful'; known: candidates, full"),
        ({"seeds": [1, 2, 1]}, r"plan\.yaml: seeds: \[1, 2, 1\] has one twice"),
        ({"models": {"Pop": {"seeds": [3, 3]}}}, r"`Pop`: seeds: \[3, 3\] has one twice"),
        ({"models": {"Pop": {"seeds": []}}}, r"`Pop`: seeds: \[\] is empty"),
        ({"models": {"Pop": {"protocols": []}}}, r"`Pop`: protocols: \[\] is empty"),
        ({"models": {"Pop": {"protocols": ["full", "full"]}}}, r"`Pop`: protocols: \['full', 'full'\] has one twice"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    plan = {**PLAN, **changes}
    if message is None:
        del plan["seeds"]
        message = r"plan\.yaml: `seeds` is missing or empty"
    with pytest.raises(ValueError, match=message):
        read_plan(write(tmp_path / "plan.yaml", **plan))


def test_a_model_can_have_seeds_of_its_own(tmp_path: Path) -> None:
    models = {"Pop": None, "SASRec": {"seeds": [2]}, "BPR": {"seeds": [1, 3]}}
    tasks = read_plan(write(tmp_path / "plan.yaml", **{**PLAN, "models": models, "protocols": {"candidates": {}}}))
    assert [(task.label, task.seed) for task in tasks] == [("Pop", 1), ("Pop", 2), ("SASRec", 2), ("BPR", 1), ("BPR", 3)]
    with pytest.raises(ValueError, match=r"`BPR`: seeds: \['x'\] is not a list"):
        read_plan(write(tmp_path / "plan.yaml", **{**PLAN, "models": {"BPR": {"seeds": ["x"]}}}))


def test_a_protocol_may_have_a_number_as_its_name(tmp_path: Path) -> None:
    plan = {**PLAN, "models": {"Pop": {}, "BPR": {"protocols": ["100"]}}, "protocols": {9: {}, 100: {}}}
    tasks = read_plan(write(tmp_path / "plan.yaml", **plan))
    assert list(dict.fromkeys((task.label, task.protocol) for task in tasks)) == [("Pop", "9"), ("Pop", "100"), ("BPR", "100")]


@pytest.mark.parametrize(("key", "own"), [("seed", "seeds"), ("dataset", "dataset"), ("model", "models")])
def test_what_names_the_runs_is_changed_in_the_file_alone(tmp_path: Path, key: str, own: str) -> None:
    file, keys = tmp_path / "plan.yaml", {key: "other"}
    write(file, **PLAN)
    with pytest.raises(ValueError, match=rf"^command line: {key}: 'other' is no key of every run; change `{own}` in {file}"):
        read_plan(file, keys)
    for changed in ({"settings": keys}, {"protocols": {"full": keys}}, {"models": {"Pop": {"settings": keys}}}):
        with pytest.raises(ValueError, match=f"{file}: .*{key}: 'other'"):
            read_plan(write(file, **{**PLAN, **changed}))


def test_every_leaderboard_has_the_shortcuts_with_one_seed_under_each_protocol(tmp_path: Path) -> None:
    plan = {key: value for key, value in PLAN.items() if key != "shortcuts"}
    models = {"Pop": {}, "RepeatRule": {"settings": {"eval_batch_size": 64}}, "graph": {"model": "TransitionGraph"}}
    tasks = read_plan(write(tmp_path / "plan.yaml", **{**plan, "models": models}), {"data_path": "here"})
    added = [task for task in tasks if task.model in SHORTCUTS and task.label not in ("RepeatRule", "graph")]
    names = [name for name in SHORTCUTS if name not in ("RepeatRule", "TransitionGraph")]  # the file has rows of its own of these
    assert [(t.label, t.protocol, t.seed) for t in added] == [(name, p, 1) for name in names for p in ("candidates", "full")]
    assert tasks[-1].settings == {"epochs": 3, "eval_args": {"mode": "full"}, "data_path": "here"}
    assert [task.seed for task in tasks if task.label == "graph"] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("item_file", "reason"),
    [
        ("item_id:token\ttitle:token_seq\ni1\tOne\n", None),
        ("item_id:token\tyear:token\ni1\t1990\n", "title_field: there is no column 'title'"),
        (None, "tiny.item, does not exist"),
    ],
)
def test_shortcuts_on_titles_are_left_out_where_there_are_none(
    item_file: str | None, reason: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    plan = write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models={"Pop": {}})

    def labels() -> list[str]:
        return [task.label for task in read_plan(plan, {"data_path": str(folder.parent)})]

    assert labels() == ["Pop", *SHORTCUTS], "data that is not on disk yet may have titles"
    (folder / "tiny.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu1\ti1\t1\n")
    if item_file:
        (folder / "tiny.item").write_text(item_file)
    assert labels() == ["Pop", *(name for name in SHORTCUTS if reason is None or not name.startswith("Nearest"))]
    assert reason is None or ("no row NearestTitles (candidates), which needs titles: " in caplog.text and reason in caplog.text)


def test_shortcuts_are_left_out_where_nothing_has_an_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    protocols = {"candidates": {}, "random": {"eval_args": {"order": "RO", "mode": "full"}}}
    plan = write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models={"BPR": {}}, protocols=protocols)
    tasks = read_plan(plan)
    assert [task.label for task in tasks if task.protocol == "random"] == ["BPR"]
    assert [task.label for task in tasks if task.protocol == "candidates"] == ["BPR", *SHORTCUTS]
    assert "no row RepeatRule (random), which cannot run: eval_args: order RO is random" in caplog.text


def test_shortcuts_are_left_out_beside_models_that_rank_several_targets_together(tmp_path: Path) -> None:
    """Their rows would make every leaderboard of general models on ratios one of runs that cannot be compared."""
    protocols = {
        "ratio": {"eval_args": {"mode": "full", "split": {"RS": [0.6, 0.2, 0.2]}}},
        "one": {"eval_args": {"mode": "full"}},
    }
    for models, expected in (({"Pop": {}, "SASRec": {}}, []), ({"SASRec": {}, "wrong": {"model": "NoModel"}}, [*SHORTCUTS])):
        plan = write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models=models, protocols=protocols)
        found = {name: [task.label for task in read_plan(plan) if task.protocol == name] for name in protocols}
        assert found == {"ratio": [*models, *expected], "one": [*models, *SHORTCUTS]}


def test_another_row_of_a_run_bears_its_results_and_not_its_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, own = read_plan(write(tmp_path / "plan.yaml", **{**PLAN, "models": {"TALLRec": {}}}))
    *_, other = read_plan(write(tmp_path / "plan.yaml", **PLAN))
    results = {"TALLRec": {"hit@1": 0.5}, "no adapter": {"hit@1": 0.25}}
    split = {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)}
    record = {"model": "TALLRec", "results": results, "trained_parameters": 9, "backbone": "b"}
    record |= {"passport": split, "protocol": {"mask_history": None}}
    monkeypatch.setattr(Task, "read", lambda self: record)
    tables = {cell.model: build([cell]).tables[0].rows[0] for cell in (own.cell(), other.cell())}
    assert {name: row.metrics["hit@1"] for name, row in tables.items()} == {"TALLRec": 0.5, "no adapter": 0.25}
    assert {name: row.trained_parameters for name, row in tables.items()} == {"TALLRec": 9, "no adapter": None}
    assert tables["no adapter"].backbone == "b"
    assert other.cell("no memory").record is None and other.cell("no memory").error == "no memory"
    del results["no adapter"]
    assert other.cell().record is None and other.cell().error == "its run has no row `no adapter`; known: TALLRec"


@pytest.mark.parametrize("file", sorted((properties_folder() / "leaderboard").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_leaderboards_that_come_with_the_package_are_runs_of_models_that_there_are(file: Path) -> None:
    tasks = read_plan(file)
    own = [task for task in tasks if task.row is None and task.seed == 2020]
    assert own and len({task.record for task in own}) == len(own), "two labels are one run"
    assert all(task.record for task in tasks), "every configuration can be read"


def test_a_property_file_says_how_a_rows_settings_were_found(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text("note: best of 6\nn_layers: 1\nepochs: 9\n")
    models = {"SASRec": {"config_files": [str(tuned)], "settings": {"epochs": 2}}, "BPR": {"settings": {"note": "its defaults"}}}
    sasrec, bpr, *_ = read_plan(write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models=models))
    assert (sasrec.config["n_layers"], sasrec.config["epochs"]) == (1, 2)
    assert [task.cell().note for task in (sasrec, bpr)] == ["best of 6", "its defaults"]
    plain = read_plan(write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models={"BPR": {}}))[0]
    assert plain.record == bpr.record, "what is said about a run does not make it another one"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        read_plan(tmp_path / "nowhere.yaml")


def test_dictionaries_of_a_plan_merge_in_their_order_and_text_stays_text(tmp_path: Path) -> None:
    plan = {
        **PLAN,
        "protocols": {"few": {"candidates": {"num_negatives": 5}, "eval_args": {"mode": "candidates"}}},
        "settings": {"candidates": {"seed": 3, "num_negatives": 7}, "noun": "7", "lora_learning_rate": 1e-4},
        "models": {"TALLRec": {"settings": {"candidates": {"source": "popularity"}, "system": "[1]"}}},
    }
    (task, _) = read_plan(write(tmp_path / "plan.yaml", **plan), {"candidates": {"seed": 4}})
    assert task.config["candidates"] == {"source": "popularity", "num_negatives": 5, "seed": 4, "file": None}
    assert (task.config["noun"], task.config["system"], task.config["lora_learning_rate"]) == ("7", "[1]", 1e-4)
    changed = task.with_settings({"candidates": {"num_negatives": 6}})
    assert changed.config["candidates"]["num_negatives"] == 6 and changed.config["candidates"]["seed"] == 4


def test_a_mistyped_value_of_an_entry_is_that_entrys(tmp_path: Path) -> None:
    models = {"Pop": {}, "wrong": {"model": "BPR", "settings": {"epochs": "ten"}}, "absent": {"model": "BRP"}}
    good, wrong, absent, *_ = read_plan(write(tmp_path / "plan.yaml", dataset="tiny", seeds=[1], models=models))
    assert good.record and good.cell().error is None
    assert re.match("epochs: 'ten' in the settings of `wrong` is not a whole number", wrong.cell().error or "")
    assert re.match("--model=BRP: no such model", absent.cell().error or "")
