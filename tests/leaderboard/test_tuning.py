"""A search decides by the validation score, repeats no run, resumes, and writes a property file."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.task import Task
from recbole_llm.leaderboard.tuning import Search, tune
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store import code, progress
from tests.leaderboard.boards import write_record

GRID = {"embedding_size": ("choice", [4, 8]), "learning_rate": ("choice", [0.1, 0.01, 0.001])}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A search with a stand-in for the runs: the validation score is given, the test says the opposite; what ran is listed."""

    def start(valid: Callable[[Any], float | None], algo: str = "exhaustive", *, bigger: bool = True, seed: int = 1, **more: Any):
        ran: list[dict[str, Any]] = []

        def run_process(arguments: list[str], log: Path, threads: int) -> str | None:
            given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
            values = {key: yaml.safe_load(given[key]) for key in search.space}
            ran.append(values)
            score = valid({**values, "seed": int(given["seed"])})
            if score is None:
                return "it does not learn"
            task = replace(search.task, seed=int(given["seed"])).with_settings(values)
            write_record(task, {"ndcg@10": score, "hit@1": 0}, {"BPR": {"ndcg@10": -score}})
            return None

        monkeypatch.setattr("recbole_llm.leaderboard.runner.run_process", run_process)
        settings = {"checkpoint_dir": str(tmp_path / "saved"), "epochs": 7, "topk": [10]}
        task = Task("BPR", "BPR", "tiny", seed, "search", settings)
        task.config.final_config_dict["valid_metric_bigger"] = bigger
        rest = {"seeds": more.pop("seeds", [seed]), "max_evals": more.pop("max_evals", None)}
        folder = tmp_path / more.pop("folder", f"tuning-{bigger}")
        search = Search(task, more.pop("space", GRID), algo=algo, folder=folder, **rest)
        return search, ran

    return start


def score(values: dict[str, Any]) -> float:
    return values["embedding_size"] / 100 - values["learning_rate"]


def test_a_grid_is_evaluated_once_each_and_the_best_of_validation_wins(
    runs: Callable[..., Any], capsys: Any, caplog: Any
) -> None:
    caplog.set_level("INFO")
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
    assert search.trials[0].settings == {"embedding_size": 8, "learning_rate": 0.001}
    assert [one.score for one in search.trials] == pytest.approx([0.079, 0.07, 0.039, 0.03, -0.02, -0.06])
    assert search.note == (
        "best of 6 by validation NDCG@10 (0.0790), exhaustive search, seed 1: "
        "embedding_size [4, 8]; learning_rate [0.1, 0.01, 0.001]"
    )
    assert "0.0790" in caplog.text and "-0.0790" not in caplog.text, "the test's metrics are not shown"
    assert capsys.readouterr().out == ""
    for folder in ("tuning-True", "another"):  # the study on disk, or none: what has a record is not run again
        again, second = runs(score, folder=folder)
        again.run()
        assert second == [] and again.trials[0] == search.trials[0]


def test_the_mean_of_several_seeds_decides(runs: Callable[..., Any]) -> None:
    def luck(values: dict[str, Any]) -> float:  # with seed 1, the largest learning rate is the best; with seed 2, it collapses
        return values["learning_rate"] * (1 if values["seed"] == 1 else -2)

    one, _ = runs(luck, seeds=[1])
    one.run()
    both, ran = runs(luck, seeds=[1, 2])
    both.run()
    assert (one.trials[0].settings["learning_rate"], both.trials[0].settings["learning_rate"]) == (0.1, 0.001)
    assert len(ran) == 6, "those of seed 1 are cached"
    assert all(trial.score == pytest.approx(-trial.settings["learning_rate"] / 2) for trial in both.trials)
    assert ", exhaustive search, seeds 1, 2: " in both.note


def test_less_is_better_where_the_metric_says_so(runs: Callable[..., Any]) -> None:
    search, _ = runs(score, bigger=False)
    search.run()
    assert search.trials[0].settings == {"embedding_size": 4, "learning_rate": 0.1}


SPACE = {"embedding_size": ("choice", [4, 8, 16]), "learning_rate": ("loguniform", [-9, -2])}


@pytest.mark.parametrize("algo", ["random", "bayes"])
def test_a_seed_draws_the_same_settings(runs: Callable[..., Any], algo: str) -> None:
    drawn = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        search, ran = runs(score, algo, seed=seed, space=SPACE, max_evals=12, folder=folder)
        search.run()
        drawn.append([trial.settings for trial in search.trials])
    assert len(drawn[0]) == 12 and drawn[0] == drawn[1] != drawn[2] and search.note.startswith("best of 12 ")
    assert all(np.exp(-9) <= values["learning_rate"] <= np.exp(-2) for values in drawn[0])


def test_bayes_draws_near_what_was_good(runs: Callable[..., Any]) -> None:
    def peak(values: dict[str, Any]) -> float:
        return -abs(np.log(values["learning_rate"]) + 5) - (values["embedding_size"] != 8)

    search, ran = runs(peak, "bayes", space=SPACE, max_evals=30)
    search.run()
    assert np.mean([peak(values) for values in ran[-10:]]) > np.mean([peak(values) for values in ran[:10]]) + 0.3


def test_a_choice_of_lists_stays_one(runs: Callable[..., Any]) -> None:
    space = {
        "embedding_size": ("choice", [4]),
        "mlp_hidden_size": ("choice", [[8, 4], [[2], 1]]),
        "learning_rate": ("choice", [1]),
    }
    search, _ = runs(lambda values: values["mlp_hidden_size"] == [8, 4], space=space)
    search.run()
    assert [trial.settings["mlp_hidden_size"] for trial in search.trials] == [[8, 4], [[2], 1]]
    assert search.best_properties()["mlp_hidden_size"] == [8, 4] and list(search.best_properties())[-1] == "note"


def test_the_file_of_the_best_settings_has_those_of_given_files(runs: Callable[..., Any], tmp_path: Path) -> None:
    search, _ = runs(score)
    file = tmp_path / "base.yaml"
    file.write_text("n_layers: 4\nepochs: 3\nlearning_rate: 1\neval_batch_size: 9\nseed: 7\n")
    search.run()
    search.task = replace(search.task, config_files=(str(file),))
    best = {"n_layers": 4, "epochs": 7, "embedding_size": 8, "learning_rate": 0.001}
    assert {key: value for key, value in search.best_properties().items() if key != "note"} == best


def test_settings_that_are_drawn_twice_count_as_one(runs: Callable[..., Any]) -> None:
    space = {"embedding_size": ("choice", [4]), "learning_rate": ("choice", [0.1, 0.01])}
    search, ran = runs(score, "random", space=space, max_evals=8)
    search.run()
    assert len(ran) == len(search.trials) == 2 and search.note.startswith("best of 2 ")


def test_a_run_that_fails_is_reported_and_does_not_stop_the_search(runs: Callable[..., Any]) -> None:
    search, ran = runs(lambda values: None if values["learning_rate"] == 0.1 else score(values))
    search.run()
    assert len(ran) == 6 and search.trials[0].settings["learning_rate"] == 0.001
    assert search.note.startswith("best of 6 (2 failed)")
    assert [one.error for one in search.trials] == [""] * 4 + ["it does not learn"] * 2
    again, ran = runs(score)
    again.run()
    assert len(ran) == 2 and again.note.startswith("best of 6 by"), "failures of an earlier start are tried again"
    search, _ = runs(lambda _: None, seed=3)
    with pytest.raises(ValueError, match="every run of the search failed; the last one: it does not learn"):
        search.run()
    search, _ = runs(lambda _: float("nan"), seed=4)
    with pytest.raises(ValueError, match="the validation score is nan"):
        search.run()


# -- a study on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_a_search_that_was_interrupted_resumes_with_the_same_settings(runs: Callable[..., Any], algo: str) -> None:
    space, budget = (GRID, None) if algo == "exhaustive" else (SPACE, 6)
    whole, ran = runs(score, algo, space=space, max_evals=budget, folder="whole")
    whole.run()
    for trial in ran:  # so that all is evaluated again
        replace(whole.task).with_settings(trial).record.unlink()

    def interrupt(values: dict[str, Any]) -> float:
        if len(first) == 4:
            raise KeyboardInterrupt
        return score(values)

    search, first = runs(interrupt, algo, space=space, max_evals=budget, folder="interrupted")
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert len(search.trials) == 3
    resumed, second = runs(score, algo, space=space, max_evals=budget, folder="interrupted")
    resumed.run()
    assert first[:3] + second == ran and first[3] == second[0] and resumed.trials == whole.trials


def test_the_line_of_a_process_that_was_killed_while_it_wrote_is_taken_off(runs: Callable[..., Any]) -> None:
    search, _ = runs(score)
    search.run()
    journal = search.folder / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    again, ran = runs(score)
    again.run()
    assert ran == [] and again.trials == search.trials, "its run has a record"
    journal.write_bytes(b"{}\n" + journal.read_bytes()[5:])
    with pytest.raises(ValueError, match="study.journal is damaged .*; delete it; the records of its runs are reused"):
        runs(score)


def test_a_journal_of_other_code_is_not_gone_on_with(runs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    search, ran = runs(score)
    search.run()
    tree = code._tree
    monkeypatch.setattr(code, "_tree", lambda name: (tree(name)[0] + "!", tree(name)[1]))
    again, ran = runs(lambda values: score(values) + 1)
    again.run()
    assert len(ran) == 6 and again.trials[0].score == search.trials[0].score + 1


def test_two_processes_share_a_study(runs: Callable[..., Any], tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def together(values: dict[str, Any]) -> float:
        if len(ran) <= 2:
            both.wait()  # one of each: neither waits for the other's search to end
        return score(values)

    one, _ = runs(together)
    other, ran = runs(together)
    threads = [threading.Thread(target=search.run) for search in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 6 and len({tuple(values.items()) for values in ran}) == 6
    assert len(one.trials) == 6 and one.trials == other.trials


def test_the_run_of_a_process_that_dies_is_taken_up_by_another(runs: Callable[..., Any]) -> None:
    others = {}

    def dies(values: dict[str, Any]) -> float:
        if len(ran) == 6 - 1:  # all but the one that another process is evaluating
            others["run"].release()
        return score(values)

    search, ran = runs(dies)
    others["run"] = FileLock(search.folder / "run-2.lock", thread_local=False)
    others["run"].acquire()
    search.run()
    assert len(ran) == 6 and len({tuple(values.items()) for values in ran}) == 6 and len(search.trials) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"algo": "grid"}, "--algo=grid: known: exhaustive, random, bayes"),
        ({"algo": "random", "max_evals": 0}, "--max_evals=0: must be at least 1"),
        ({"max_evals": 4}, "--max_evals=4: exhaustive evaluates all 6"),
        ({"space": {"reg": ("uniform", [0, 1])}}, "--algo=exhaustive: `reg` is not a choice"),
    ],
)
def test_an_algorithm_that_does_not_fit(runs: Callable[..., Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs(score, **more)


@pytest.mark.slow
def test_a_search_that_was_killed_frees_its_run_and_is_resumed(tmp_path: Path) -> None:
    code = """
import json, os, signal
from pathlib import Path
from recbole_llm.store.json_files import sealed
from recbole_llm.leaderboard import runner, tuning
from recbole_llm.leaderboard.task import Task

ran = []
def run_process(arguments, log, threads):
    ran.append(arguments)
    if len(ran) == 3 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    own = task.with_settings({"embedding_size": int(given["embedding_size"])})
    parts = {"results": {}, "ranks": {}, "slices": {}, "passport": {"filters": {}, "sha256": {}}}
    parts |= {"protocol": {"mask_history": None}, "fingerprint": own.config.fingerprint}
    found = {"best_valid_result": {"mrr@10": int(given["embedding_size"])}}
    own.record.parent.mkdir(parents=True)
    own.record.write_text(sealed({**parts, **found}))

runner.run_process = run_process
task = Task("BPR", "BPR", "tiny", 1, "search", {"valid_metric": "MRR@10", "topk": [10]})
space = {"embedding_size": ("choice", [4, 8, 16, 32])}
search = tuning.Search(task, space, algo="exhaustive", max_evals=None, seeds=[1], folder=Path("tuning"))
search.run()
print(len(ran), search.note)
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("2 best of 4 by validation MRR@10 (32.0000)")


@pytest.mark.slow
def test_a_search_leaves_a_property_file_that_a_run_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "train_batch_size")
    given = [f"--{key}={settings[key]}" for key in keys]
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [4, 8]\n")
    result = tune("BPR", "tiny", params_file=tmp_path / "BPR.hyper", arguments=["--epochs=1", *given])
    folder = Path(settings["checkpoint_dir"]) / "tuning" / "tiny"
    assert "valid " in result.table() and result.file == folder / "BPR.yaml"
    assert [path.name for path in folder.glob("BPR-*/*.journal")] == ["study.journal"]
    text = result.file.read_text()
    found = yaml.safe_load(text)
    assert text.startswith("# recbole-llm tune --model=BPR --dataset=tiny --params_file=") and "--epochs=1" in text
    assert found["embedding_size"] == result.best["embedding_size"] and found["note"] == result.note
    assert list(found) == ["epochs", "train_batch_size", "embedding_size", "note"], "nothing about the data or the protocol"
    records = list((Path(settings["checkpoint_dir"]) / "runs").iterdir())
    assert len(records) == 2
    run_recbole_llm("BPR", "tiny", [str(result.file)], cmd_line=[*given, "--show_progress=False"])
    assert sorted((Path(settings["checkpoint_dir"]) / "runs").iterdir()) == sorted(records), "it is the run that won"


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [4, 8]\n")
    given: dict[str, Any] = {"params_file": tmp_path / "BPR.hyper"}
    with pytest.raises(ValueError, match="--model=BRP: no such model. Did you mean BPR"):
        tune("BRP", "tiny", **given)
    with pytest.raises(ValueError, match=r"--seeds=2020,2021: give a list of whole numbers, such as \[2020, 2021\]"):
        tune("BPR", "tiny", **given, seeds="2020,2021")
    with pytest.raises(ValueError, match="unknown key `epoch`"):
        tune("BPR", "tiny", **given, arguments=["--epoch=3"])
    (tmp_path / "BPR.hyper").write_text("embeding_size choice [4, 8]\n")
    with pytest.raises(ValueError, match="--params_file=.*BPR.hyper: .*`embeding_size`"):  # before any run
        tune("BPR", "tiny", **given)


def test_a_search_tells_what_its_run_does(runs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    search, ran = runs(lambda values: values["embedding_size"] / 10, space={"embedding_size": ("choice", [4, 8])})
    news, run = threading.Condition(), runner.run_process

    def slow(arguments: list[str], log: Path, threads: int) -> str | None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"27 Nov 05:20    INFO  epoch {len(ran)} training\n")
        own = (len(ran), 2, f"BPR: epoch {len(ran)} training")
        with news:  # its own: the bar may tell the line of the run before once more
            assert news.wait_for(lambda: own in told, 60)
        return run(arguments, log, threads)

    def tell(self: Any, line: str) -> None:
        with news:
            told.append((self._done, self._total, line))
            news.notify_all()

    told: list[Any] = []
    monkeypatch.setattr(runner, "run_process", slow)
    monkeypatch.setattr(runner, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(progress.Bar, "tell", tell)
    search.run()
    assert len(ran) == 2
