"""A search reads literals, asks the validation users alone, repeats no run, and leaves a property file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.config import LLMConfig, properties_folder
from recbole_llm.leaderboard.plan import Task
from recbole_llm.leaderboard.tuning import Search, main, read_space
from recbole_llm.quick_start import run_recbole_llm

GRID = {"choice": {"embedding_size": [4, 8], "learning_rate": [0.1, 0.01, 0.001]}}


def test_a_search_file_is_recboles(tmp_path: Path) -> None:
    file = tmp_path / "BPR.hyper"
    file.write_text(
        "# a comment\nlearning_rate loguniform -8, 0\nembedding_size choice [32, 64]\n\n"
        "mlp_hidden_size choice ['[64,64]', '[128]']\nreg uniform 0,1\nn_layers quniform 1, 4, 1\n"
    )
    assert read_space(file) == {
        "loguniform": {"learning_rate": [-8, 0]},
        "choice": {"embedding_size": [32, 64], "mlp_hidden_size": ["[64,64]", "[128]"]},
        "uniform": {"reg": [0, 1]},
        "quniform": {"n_layers": [1, 4, 1]},
    }


@pytest.mark.parametrize(
    "line",
    [
        "reg choice [__import__('pathlib').Path('owned').touch()]",
        "reg uniform __import__('pathlib').Path('owned').touch(), 1",
        "reg choice",
        "reg choice []",
        "reg choice 3",
        "reg uniform 1",
        "reg uniform 1, 0",
        "reg uniform 'a', 'b'",
        "reg normal 0, 1",
        "reg quniform 0, 1",
    ],
)
def test_a_line_that_is_no_search_is_shown_and_nothing_is_executed(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.hyper"
    file.write_text(f"epochs choice [1]\n{line}\n")
    with pytest.raises(ValueError, match=r"x\.hyper, line 2: .* is none of: KEY choice"):
        read_space(file)
    assert not Path("owned").exists()


@pytest.mark.parametrize("key", ["seed", "candidates", "eval_args", "eval_users", "new_items", "topk"])
def test_what_is_measured_is_not_searched(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.hyper").write_text(f"{key} choice [1, 2]\n")
    with pytest.raises(ValueError, match=f"`{key}` answer another question"):
        read_space(tmp_path / "x.hyper")


@pytest.mark.parametrize("file", sorted((properties_folder() / "search").iterdir()), ids=lambda file: file.stem)
def test_the_spaces_that_come_with_the_package_are_of_keys_of_their_models(file: Path) -> None:
    values = {key: choices[0] for keys in read_space(file).values() for key, choices in keys.items()}
    config = LLMConfig(file.stem, "tiny", config_dict=values)
    plain = LLMConfig(file.stem, "tiny")
    assert all(key in plain.final_config_dict and config[key] == value for key, value in values.items())


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "x.hyper").write_text("# nothing\n")
    with pytest.raises(ValueError, match="nothing to search"):
        read_space(tmp_path / "x.hyper")
    with pytest.raises(FileNotFoundError, match="--params_file: nowhere does not exist"):
        read_space(Path("nowhere"))


# -- the search, with runs that write a record at once -------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Search with a stand-in for the runs: validation scores are given, the test says the opposite; what ran is told."""

    def start(valid: Callable[[Any], float | None], algo: str = "exhaustive", *, bigger: bool = True, seed: int = 1, **more: Any):
        ran: list[dict[str, Any]] = []

        def run_process(arguments: list[str], log: Path, threads: int) -> str | None:
            given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
            values = {key: yaml.safe_load(given[key]) for keys in search.given.values() for key in keys}
            ran.append(values)
            score = valid({**values, "seed": int(given["seed"])})
            if score is None:
                return "it does not learn"
            task = replace(search.task, seed=int(given["seed"])).with_settings(values)
            record = {"best_valid_result": {"ndcg@10": score, "hit@1": 0}, "results": {"BPR": {"ndcg@10": -score}}}
            task.record.parent.mkdir(parents=True, exist_ok=True)
            task.record.write_text(json.dumps(record))
            return None

        monkeypatch.setattr("recbole_llm.leaderboard.tuning.run_process", run_process)
        settings = {"checkpoint_dir": str(tmp_path / "saved"), "epochs": 7, "topk": [10]}
        task = Task("BPR", "BPR", "tiny", seed, "search", settings)
        rest = {"seeds": more.pop("seeds", [seed]), "max_evals": more.pop("max_evals", None), "logs": tmp_path}
        search = Search(task, more.pop("space", GRID), algo=algo, **rest)
        task.config.final_config_dict["valid_metric_bigger"] = bigger
        return search, ran

    return start


def score(values: dict[str, Any]) -> float:
    return values["embedding_size"] / 100 - values["learning_rate"]


def test_a_grid_is_seen_once_each_and_the_best_of_validation_wins(runs: Callable[..., Any], capsys: Any) -> None:
    search, ran = runs(score)
    search.run()
    assert sorted((v["embedding_size"], v["learning_rate"]) for v in ran) == [
        (4, 0.001),
        (4, 0.01),
        (4, 0.1),
        (8, 0.001),
        (8, 0.01),
        (8, 0.1),
    ]
    assert search.best_params == {"embedding_size": 8, "learning_rate": 0.001}
    assert search.note == (
        "best of 6 by validation NDCG@10 (0.0790), exhaustive search, seed 1: "
        "embedding_size [4, 8]; learning_rate [0.1, 0.01, 0.001]"
    )
    shown = capsys.readouterr().out + search.table()
    assert "0.0790" in shown and "-0.0790" not in shown, "the test's metrics are not shown"
    again, second = runs(score)
    again.run()
    assert second == [] and again.best_params == search.best_params, "what has a record is not run again"


def test_several_seeds_are_asked_and_their_mean_decides(runs: Callable[..., Any]) -> None:
    def luck(values: dict[str, Any]) -> float:  # with seed 1, the largest learning rate is the best; with seed 2, it collapses
        return values["learning_rate"] * (1 if values["seed"] == 1 else -2)

    one, _ = runs(luck, seeds=[1])
    one.run()
    both, ran = runs(luck, seeds=[1, 2])
    both.run()
    assert (one.best_params["learning_rate"], both.best_params["learning_rate"]) == (0.1, 0.001)
    assert len(ran) == 6, "those of seed 1 are kept"
    assert both.score_list == pytest.approx([-lr / 2 for _ in "ab" for lr in (0.1, 0.01, 0.001)])
    assert ", exhaustive search, seeds 1, 2: " in both.note


def test_less_is_better_where_the_metric_says_so(runs: Callable[..., Any]) -> None:
    search, _ = runs(score, bigger=False)
    search.run()
    assert search.best_params == {"embedding_size": 4, "learning_rate": 0.1}


def test_a_seed_draws_the_same_settings(runs: Callable[..., Any]) -> None:
    space = {"choice": {"embedding_size": [4, 8, 16]}, "loguniform": {"learning_rate": [-9, -2]}}
    drawn = []
    for seed in (1, 1, 2):
        search, _ = runs(score, "random", seed=seed, space=space, max_evals=4)
        search.run()
        drawn.append([values for values, *_ in search.outcomes])
    assert len(drawn[0]) == 4 and drawn[0] == drawn[1] != drawn[2]
    search, _ = runs(score, "bayes", space=space, max_evals=3)
    search.run()
    assert len(search.outcomes) == 3


def test_a_choice_of_lists_stays_one(runs: Callable[..., Any]) -> None:
    space = {"choice": {"embedding_size": [4], "learning_rate": [0.1], "mlp_hidden_size": [[8, 4], [[2], 1]]}}
    search, _ = runs(score, space=space)
    search.run()
    assert [params["mlp_hidden_size"] for params, *_ in search.outcomes] == [[8, 4], [[2], 1]]
    assert search.best_params["mlp_hidden_size"] == [8, 4] and "- 8\n" in search.properties("")


def test_settings_that_are_drawn_twice_are_one_of_those_seen(runs: Callable[..., Any]) -> None:
    search, ran = runs(score, "random", space={"choice": {"embedding_size": [4], "learning_rate": [0.1, 0.01]}}, max_evals=8)
    search.run()
    assert len(ran) == len(search.outcomes) == 2 and search.note.startswith("best of 2 ")


def test_a_run_that_fails_ends_nothing_and_is_told(runs: Callable[..., Any]) -> None:
    search, ran = runs(lambda values: None if values["learning_rate"] == 0.1 else score(values))
    search.run()
    assert len(ran) == 6 and search.best_params["learning_rate"] == 0.001
    assert search.note.startswith("best of 6 (2 failed)") and search.table().count("it does not learn") == 2
    search, _ = runs(lambda _: None, seed=3)
    with pytest.raises(ValueError, match="every run of the search failed; the last one: it does not learn"):
        search.run()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"algo": "grid"}, "--algo=grid: there is exhaustive, random and bayes"),
        ({"algo": "random", "max_evals": 0}, "--max_evals=0: at least one run"),
        ({"max_evals": 4}, "--max_evals=4: exhaustive takes all 6"),
        ({"space": {"uniform": {"reg": [0, 1]}}}, "--algo=exhaustive: `reg` is no choice"),
    ],
)
def test_an_algorithm_that_does_not_fit(runs: Callable[..., Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs(score, **more)


@pytest.mark.slow
def test_the_command_leaves_a_property_file_that_a_run_takes(settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "train_batch_size")
    given = [f"--{key}={settings[key]}" for key in keys]
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [4, 8]\n")
    main(["--model=BPR", "--dataset=tiny", f"--params_file={tmp_path / 'BPR.hyper'}", "--epochs=1", *given])
    assert "valid " in capsys.readouterr().out
    file = Path(settings["checkpoint_dir"]) / "hyper" / "tiny" / "BPR.yaml"
    text = file.read_text()
    found = yaml.safe_load(text)
    assert text.startswith("# python run_hyper.py --model=BPR --dataset=tiny") and found["embedding_size"] in (4, 8)
    assert set(found) == {"note", "epochs", "train_batch_size", "embedding_size"}, "nothing about the data or the protocol"
    records = list((Path(settings["checkpoint_dir"]) / "runs").iterdir())
    assert len(records) == 2
    run_recbole_llm("BPR", "tiny", [str(file)], cmd_line=[*given, "--show_progress=False"])
    assert sorted((Path(settings["checkpoint_dir"]) / "runs").iterdir()) == sorted(records), "it is the run that won"


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [4, 8]\n")
    files = f"--params_file={tmp_path / 'BPR.hyper'}"
    with pytest.raises(SystemExit, match="error: --model=BRP: no such model. Did you mean BPR"):
        main(["--model=BRP", "--dataset=tiny", files])
    with pytest.raises(SystemExit, match=r"error: --seeds=2020,2021: give a list of whole numbers, as \[2020, 2021\]"):
        main(["--model=BPR", "--dataset=tiny", files, "--seeds=2020,2021"])
    with pytest.raises(SystemExit, match="error: unknown key `epoch`"):
        main(["--model=BPR", "--dataset=tiny", files, "--epoch=3"])
