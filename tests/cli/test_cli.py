"""One command with five parts: what --help says and imports, how arguments are read, and what a mistake ends in."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import recbole_llm
from recbole_llm import cli, logs
from recbole_llm.cli import commands
from recbole_llm.cli.options import parser
from recbole_llm.config import LLMConfig
from recbole_llm.config.values import parse_value
from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.embedded import END
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.merging.folders import METHODS
from recbole_llm.registry import MODELS

ROOT = Path(recbole_llm.__file__).parents[1]
HEAVY = {"torch", "recbole", "transformers", "peft", "pandas", "numpy", "scipy", "sentence_transformers", "matplotlib"}
COMMANDS = [
    "run",
    "leaderboard",
    "replicate",
    "tune",
    "merge",
    "forecast",
    "views",
    "data convert",
    "data describe",
    "data passport",
    "data export",
    "doctor",
    "cache list",
    "cache clean",
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line that a mistake ends in."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert end.value.code == code and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith(f"{line}\n")
    return line


def imported(*arguments: str) -> set[str]:
    """What a fresh interpreter has imported of HEAVY when the command ends by itself."""
    code = f"""
import sys
from recbole_llm.cli import main
try:
    main({list(arguments)})
except SystemExit:
    pass
print(*({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.slow
def test_a_command_imports_large_libraries_without_searches_for_garbage(tmp_path: Path) -> None:
    code = """
import gc, sys
searches = []
from recbole_llm.cli import main
gc.callbacks.append(lambda *_: searches.append("torch" in sys.modules and not gc.get_freeze_count()))
try:
    main(["run", "--model=Pop", "--dataset=none", "--data_path=."])
except SystemExit:
    pass
print(sum(searches), gc.get_freeze_count(), gc.isenabled(), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    *_, error, told = done.stderr.splitlines()
    searches, kept, enabled = told.split()
    assert error.startswith("error: ") and "none" in error
    assert searches == "0" and int(kept) > 100_000 and enabled == "True"


def test_a_command_in_a_process_that_has_torch_leaves_the_collector_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = gc.get_freeze_count(), gc.isenabled()
    refused(capsys, "run", "--model=Pop", "--dataset=none", "--data_path=.")
    assert gc.get_freeze_count() <= before[0] and gc.isenabled() == before[1]  # what was frozen before may be freed


# -- help ----------------------------------------------------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [[], ["data"], ["cache"], *(name.split() for name in COMMANDS)], ids=lambda command: " ".join(command) or "all"
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    assert imported(*command, "--help") == set()


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys)
    assert all(re.search(rf"^ +{name.split()[0]}\b", shown, re.MULTILINE) for name in COMMANDS)
    assert "--key=value" in shown and "exit code" in shown and "RECBOLE_LLM_TRACEBACK" in shown


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("run", ["--model", "--dataset", "--config_files", *MODELS, "resumes", "record.json"]),
        ("leaderboard", ["--config_files", "--jobs", "--engine", "--out", "--show", "paired tests"]),
        ("replicate", ["NAME", "--jobs", "--engine", "--out", "--show", "properties/claims", "docs/replication.md"]),
        ("tune", ["--model", "--params_file", "--algo", "--max_evals", "--seeds", "--output_file", "loguniform"]),
        ("merge", ["--adapters", "--out", "--weights", "--density", "--residual", "--compress_rank", *METHODS]),
        ("forecast", ["RUN", "--out", "--metric", "Nothing is trained"]),
        ("views", ["--dataset", "--out", "--config_files", "No item is in two"]),
        (
            "data convert",
            ["SOURCE", "--to", "--items", "--columns", "--k_core", "--show", "MovieLens", "MIND", "Nothing is overwritten"],
        ),
        ("data describe", ["NAME", "--picture", "--llm", "ties", "cold", "Nothing is trained"]),
        ("data passport", ["--dataset", "--config_files", "properties/splits", "--eval_args"]),
        ("data export", ["--dataset", "--config_files", "--out", "RecTools", "--model=Imported"]),
        ("doctor", ["--checkpoint_dir", "remedy", "exit code is 1"]),
        ("cache list", ["--checkpoint_dir", "no run record names"]),
        ("cache clean", ["--checkpoint_dir", "--unused", "is alive stay"]),
    ],
)
def test_help_of_a_command(command: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, *command.split())
    assert [part for part in parts if part not in shown] == []
    examples = re.findall(
        rf"^  recbole-llm {command}(?: --| saved/| songs| plays| ml-|$)", shown.split("examples:")[1], re.MULTILINE
    )
    assert len(examples) == 2
    assert max(map(len, shown.splitlines())) <= 130


@pytest.mark.parametrize(("command", "model"), [("run", "LoRACocktail"), ("tune", "SASRec"), ("views", "WeaveRec")])
def test_help_shows_the_defaults_that_hold(command: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = re.split(r"^keys.*defaults.*:$", help_of(capsys, *command.split()), flags=re.MULTILINE)[1].split("examples:")[0]
    given = re.findall(r"(?:^  |; |, | {3,})--(\w+)=(\"[^\"]*\"|[^\s,;]+)", keys, re.MULTILINE)
    config, other = LLMConfig(model, "ml-100k"), LLMConfig("WeaveRec", "ml-100k")
    shown = {key: parse_value(text.strip('"')) for key, text in given if text not in ("DIR", "FOLDER_OR_HUB_ID")}
    assert len(shown) >= 3
    for key, value in shown.items():
        if key == "eval_args":  # taken apart by LLMConfig
            assert value == {"mode": "candidates"} and config["candidate_phases"] == ["valid", "test"]
            continue
        default = (config if key in config.final_config_dict else other)[key]
        if isinstance(value, dict):
            default = {name: default[name] for name in value}
        assert str(default) == str(value), key


def test_examples_of_help_are_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(ROOT)
    for command in COMMANDS:
        for line in re.findall(r"^  recbole-llm (.*)$", help_of(capsys, *command.split()), re.MULTILINE):
            options, keys = parser().parse_known_args(shlex.split(line))
            assert options.function is getattr(commands, command.replace(" ", "_"))
            assert cli._keys(keys) == keys


# -- arguments -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What run_recbole_llm is called with, in place of runs."""
    calls: list[dict[str, Any]] = []

    def run_recbole_llm(model: Any, dataset: Any, files: Any, cmd_line: Any) -> None:
        calls.append({"model": model, "dataset": dataset, "files": files, "keys": cmd_line})

    monkeypatch.setattr("recbole_llm.quick_start.run_recbole_llm", run_recbole_llm)
    return calls


@pytest.mark.parametrize("command", [["run"], []], ids=["run", "no command"])
def test_without_a_command_it_is_run(command: list[str], started: list[dict[str, Any]]) -> None:
    Path("a.yaml").touch()
    cli.main(
        [*command, "--model=SASRec", "--dataset", "ml-100k", "--config_files=a.yaml properties/overall.yaml", "--topk=[1, 5]"]
    )
    cli.main([*command, "-m", "Pop", "-d", "ml-1m"])
    files = ["a.yaml", "properties/overall.yaml"]
    assert started == [
        {"model": "SASRec", "dataset": "ml-100k", "files": files, "keys": ["--topk=[1, 5]"]},
        {"model": "Pop", "dataset": "ml-1m", "files": None, "keys": []},
    ]


@pytest.mark.parametrize("script", [["run_recbole_llm.py"], ["-m", "recbole_llm.cli"], ["-m", "recbole_llm.cli", "run"]])
def test_the_ways_to_start_a_run(script: list[str]) -> None:
    line = [sys.executable, *script, "--model=SASREK", "--dataset=ml-100k"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --model=SASREK: no such model. Did you mean SASRec") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see recbole-llm --help"),
        (["rnu"], "invalid choice: 'rnu'"),
        (["run"], "--model is missing"),
        (["run", "--model=TALRec"], "--model=TALRec: no such model. Did you mean TALLRec"),
        (["run", "--model=Pop", "epochs=3"], "'epochs=3' is not of the form --key=value"),
        (["run", "--model=Pop", "--epochs", "3"], "'--epochs' is not of the form --key=value"),
        (["run", "--model=Pop", "--config_files=nowhere.yaml"], "--config_files: nowhere.yaml does not exist (current folder: "),
        (["run", "--model=Pop", "--nproc=2"], "nproc: 2 in the command line: this option of RecBole is not supported"),
        (["run", "--model=Pop", "--world_size=4"], "world_size: 4 in the command line: this option of RecBole is not supported"),
        (["run", "--model=Pop", "--ip=10.0.0.1"], "ip: 10.0.0.1 in the command line: this option"),
        (["run", "--model=Pop", "--port=1"], "port: 1 in the command line: this option"),
        (["run", "--model=Pop", "--save_dataloaders=True"], "save_dataloaders: True in the command line: this option"),
        (["leaderboard"], "required: --config_files; see recbole-llm leaderboard --help"),
        (["leaderboard", "--config_files=nowhere.yaml"], "--config_files: nowhere.yaml does not exist"),
        (["leaderboard", "--config_files=properties/overall.yaml", "--engine=ray"], "invalid choice: 'ray'"),
        (["tune", "--model=BPR", "--dataset=tiny", "--params_file=nowhere.hyper"], "nowhere.hyper does not exist"),
        (
            ["tune", "--model=BPR", "--dataset=tiny", "--params_file=properties/search/BPR.hyper", "--seeds=2020,2021"],
            "--seeds: '2020,2021' is not a list of whole numbers, such as [2020, 2021]",
        ),
        (["tune", "--model=BRP", "--dataset=tiny", "--params_file=properties/search/BPR.hyper"], "Did you mean BPR"),
        (["merge", "--adapters=a"], "required: --out"),
        (["merge", "--adapters=a", "--out=b", "--what=1"], "no option --what"),
        (["merge", "--adapters=absent", "--out=b"], "there is no folder absent"),
        (["views"], "required: --dataset"),
        (["look", "--runs", "a", "--out=look.txt"], "--out=look.txt: give the name of an .html file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_arguments_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("switch", [["--show"], ["--show=True"], ["--show", "True"]])
def test_a_switch_may_stand_before_a_name(switch: list[str]) -> None:
    for command, name in ((["replicate"], "names"), (["data", "convert", "--to=x"], "source")):
        options, others = parser().parse_known_args([*command, *switch, "here"])
        assert options.show == "True" and "here" in str(getattr(options, name)) and not others


def test_mistakes_in_arguments_import_nothing_heavy() -> None:
    assert imported("look", "--runs", "a", "--out=look.txt") == set()
    assert imported("run", "--model=SASREK") <= {"recbole"}, "its folder is listed"
    assert imported("run", "--model=SASRec", "--nproc=2") == set()
    assert imported("merge", "--adapters=absent", "--out=b") == set()


def test_what_fails_later_ends_in_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data_path: Path
) -> None:
    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    arguments = ["--model=Pop", "--dataset=tiny", f"--data_path={data_path}", "--topkk=5"]
    assert "unknown key `topkk` in the command line; did you mean `topk`?" in refused(capsys, *arguments)
    monkeypatch.setenv("RECBOLE_LLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(arguments)


@pytest.mark.parametrize("text", ["", "in two\nlines"])
def test_an_error_that_nobody_expects_is_one_line_with_the_log_that_has_its_traceback(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError(text)

    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    monkeypatch.setattr("recbole_llm.quick_start.create_dataset", broken)
    arguments = ["--model=Pop", "--dataset=tiny", f"--data_path={data_path}"]
    line = refused(capsys, *arguments)
    (log,) = Path("log/Pop").iterdir()
    assert re.fullmatch(
        rf"error: KeyError: .*; this is a bug in the package, .*; log file: {log.absolute()}; RECBOLE_\S+ .*", line
    )
    assert "Traceback (most recent call last):" in log.read_text() and "in broken" in log.read_text()
    monkeypatch.setenv("RECBOLE_LLM_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(arguments)


def test_before_a_run_has_a_log_an_unexpected_error_makes_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    monkeypatch.setattr("recbole_llm.quick_start.LLMConfig", lambda *_: {}["absent"])
    logs.init_console()
    line = refused(capsys, "--model=Pop", "--dataset=tiny")
    (log,) = Path("log").iterdir()
    assert str(log) in line and "KeyError: 'absent'" in log.read_text()


@pytest.mark.parametrize("broken", ["int('x')", "json.loads('{')", "[] + 1", "b'\\xff'.decode()"])
def test_an_error_that_an_operation_or_a_library_raises_is_not_told_as_advice(
    broken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    monkeypatch.setattr("recbole_llm.quick_start.LLMConfig", lambda *_: eval(broken, {"json": json}))
    assert "this is a bug in the package" in refused(capsys, "--model=Pop", "--dataset=tiny")


def test_what_a_users_model_raises_is_its_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_path: Path
) -> None:
    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    monkeypatch.setattr("recbole_llm.registry._own", {})
    (tmp_path / "own_raising.py").write_text(
        "from recbole.model.general_recommender import BPR\n\n\nclass OwnRaising(BPR):\n"
        "    def __init__(self, config, dataset):\n        raise ValueError(f'users: {dataset.user_num} are too few')\n"
    )
    arguments = ["--model=own_raising:OwnRaising", "--dataset=tiny", f"--data_path={data_path}"]
    assert refused(capsys, *arguments) == "error: users: 61 are too few"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_and_the_usual_exit_code(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in a job of the background
    cleaned: list[bool] = []

    def interrupted(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("recbole_llm.quick_start.run_recbole_llm", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--model=Pop"])
    signal.signal(signal.SIGINT, before)
    assert end.value.code == code and cleaned == [True]
    assert capsys.readouterr().err == "interrupted: finished stages and runs are kept, and the same command reuses them\n"
    assert signal.getsignal(signal.SIGTERM) == handler


# -- leaderboard and tune ------------------------------------------------------------------------------------------------------


def plan(file: Path, settings: dict[str, Any], **models: Any) -> str:
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "train_batch_size")
    content = {"dataset": "tiny", "seeds": [1, 2], "settings": {key: settings[key] for key in keys}, "models": models}
    content |= {"shortcuts": False}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return f"--config_files={file}"


def test_a_dictionary_without_quotes_changes_only_its_keys_of_a_leaderboard_file(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = tmp_path / "mine.yaml", []
    given = plan(file, {**settings, "candidates": {"source": "popularity", "num_negatives": 9}}, Pop={})

    def make(path: Path, changes: dict[str, Any], **_: Any) -> Any:
        found.extend(read_plan(path, changes))
        raise ValueError("enough")

    monkeypatch.setattr("recbole_llm.leaderboard.board.make_leaderboard", make)
    with pytest.raises(SystemExit):
        cli.main(["leaderboard", given, "--candidates={num_negatives:5}"])
    assert found[0].settings["candidates"] == {"source": "popularity", "num_negatives": 5}


@pytest.mark.slow
def test_a_file_becomes_a_leaderboard_and_a_new_model_is_all_that_is_run_next(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = runner.run_process
    monkeypatch.setattr(runner, "run_process", lambda arguments, *rest: ran.append(arguments[0]) or run(arguments, *rest))
    file = tmp_path / "mine.yaml"
    with pytest.raises(SystemExit) as end:
        cli.main(["leaderboard", plan(file, settings, Pop={}, Wrong={"model": "NoSuchModel"}), "--jobs=2"])
    assert end.value.code == 1, "a run failed"
    shown = capsys.readouterr().out
    assert "| Pop" in shown and "NoSuchModel: no such model" in shown
    folder = Path(settings["checkpoint_dir"]) / "leaderboard" / "mine"
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".json", ".md", ".csv", ".tex", ".html"}
    (row,) = [row for row in json.loads((folder / "leaderboard.json").read_text())["tables"][0]["rows"] if row["label"] == "Pop"]
    assert row["trained_parameters"] is not None and row["users_per_second"] > 0 and row["peak_memory_bytes"] > 1e7
    assert row["cells"][0]["command"].startswith("python run_recbole_llm.py --model=Pop --dataset=tiny ")

    page = tmp_path / "page.md"
    page.write_text(f"<!-- leaderboard mine: written by recbole-llm leaderboard -->\n{END}\n")
    cli.main(["leaderboard", plan(file, settings, Pop={}, BPR={"settings": {"epochs": 1}}), f"--page={page}"])
    assert "| BPR" in page.read_text()
    assert ran == ["--model=Pop"] * 2 + ["--model=BPR"] * 2
    assert "| BPR" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["leaderboard", plan(file, settings, Pop={}, Wrong={"model": "NoSuchModel"}, LightGCN={}), "--show"])
    shown = capsys.readouterr().out
    assert len(ran) == 4 and "NoSuchModel: no such model" in shown and "seed 1 has not run" in shown


@pytest.mark.slow
def test_tune_leaves_a_property_file(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "metrics", "train_batch_size")
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [4, 8]\n")
    out = tmp_path / "best.yaml"
    command = ["tune", "--model=BPR", "--dataset=tiny", f"--params_file={tmp_path / 'BPR.hyper'}", f"--output_file={out}"]
    cli.main([*command, "--seeds=[1, 2]", "--epochs=1", *(f"--{key}={settings[key]}" for key in keys)])
    assert "embedding_size" in capsys.readouterr().out
    assert "seeds 1, 2" in out.read_text() and yaml.safe_load(out.read_text())["embedding_size"] in (4, 8)
    assert "unknown key `epoch`" in refused(capsys, *command, "--epoch=3", f"--data_path={settings['data_path']}")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nothing_reads_is_no_error(unbuffered: str, tmp_path: Path) -> None:
    """As with ``| head``, which ends after its last line."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "recbole_llm.cli", "cache", "list", f"--checkpoint_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
