"""A log has what a user can act on, results in plain numbers, and no control characters where nobody sees colours."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.utils import dict2str, set_color

import recbole_llm
from recbole_llm import logs
from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import run_recbole_llm

ROOT = Path(recbole_llm.__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- a whole run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SASRec", "LoRACocktail"])
def test_a_run_is_quiet_on_a_pipe(model: str, settings: dict[str, Any]) -> None:
    import yaml

    Path("tiny.yaml").write_text(yaml.safe_dump({**settings, "show_progress": True, "epochs": 2}))
    line = [sys.executable, str(ROOT / "run_recbole_llm.py"), f"--model={model}", "--dataset=tiny", "--config_files=tiny.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = Path(f"log/{model}").glob("*.log")
    for text in (done.stdout + done.stderr, file.read_text()):
        assert not [part for part in ("\x1b", "\r", "%|", "OrderedDict", "np.float64", "note = None") if part in text]
    assert "Warning" not in done.stderr and "Loading weights" not in done.stderr
    assert done.stderr.count("configuration: ") == 1 and "candidates={'num_negatives': 9}" in done.stderr
    assert "test result: hit@1 0." in done.stderr and len(done.stderr.splitlines()) < 65
    assert "FutureWarning" in file.read_text(), "what is not shown is kept"


def test_two_runs_of_a_process_have_a_log_file_each(settings: dict[str, Any]) -> None:
    kept = list(logging.getLogger().handlers)  # pytest's
    for seed in (1, 2):
        run_recbole_llm("Pop", "tiny", config_dict={**settings, "seed": seed})
    files = sorted(Path("log/Pop").glob("*.log"))
    assert len(files) == 2
    for file in files:
        assert file.read_text().count("test result") == 1
    ours = [handler for handler in logging.getLogger().handlers if handler not in kept]
    assert sum(isinstance(handler, logging.FileHandler) for handler in ours) == 1 and len(ours) == 2
    assert all(h in logging.getLogger().handlers for h in kept if type(h).__module__ == "_pytest.logging")


# -- handlers ------------------------------------------------------------------------------------------------------------------


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    line = set_color("epoch 0 training", "green")
    for stream, environment, coloured in (
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (io.StringIO(), {}, False),
    ):
        monkeypatch.delenv("NO_COLOR", raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "stderr", stream)
        logs.init_console()
        logging.getLogger().info(line)
        logging.getLogger().warning("look")
        assert stream.getvalue().count("\x1b[") == (4 if coloured else 0)
        assert "INFO  " in stream.getvalue() and "WARNING  look" in stream.getvalue()


def test_results_of_recboles_trainer_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.init_console()
    result = OrderedDict([("hit@1", np.float64(0.48356)), ("ndcg@10", np.float64(1e-5))])
    logging.getLogger().info(set_color("valid result", "blue") + ": \n" + dict2str(result))
    logging.getLogger().info("a table\n---  ---\nPop : 3")
    shown = capsys.readouterr().err
    assert "INFO  valid result: hit@1 0.4836, ndcg@10 0.0000\n" in shown
    assert shown.endswith("a table\n---  ---\nPop : 3\n"), "what is no result stays as it is"


def test_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    logs.init_console()
    logging.getLogger("faiss.loader").info("Loading faiss")
    logging.getLogger("faiss.loader").warning("something is wrong")
    shown = capsys.readouterr().err
    assert "Loading faiss" not in shown and "something is wrong" in shown


def test_a_warning_is_given_once_in_each_log(capsys: pytest.CaptureFixture[str]) -> None:
    kept = list(logging.getLogger().handlers)  # pytest's
    try:
        for _ in range(2):
            logs.init_console()
            for text in ("6 titles are alike", "7 titles are alike", "6 titles are alike"):
                logging.getLogger().warning(text)
                logging.getLogger().info("a step")
            shown = capsys.readouterr().err
            assert [shown.count(text) for text in ("6 titles", "7 titles", "a step")] == [1, 1, 3]
    finally:
        logging.getLogger().handlers[:] = kept


def test_python_warnings_are_shown_of_the_users_code_alone(settings: dict[str, Any]) -> None:
    code = f"""
import logging, sys, warnings
from types import SimpleNamespace
from recbole_llm import logs

class Config(dict):
    final_config_dict = {{}}

file = logs.init_logging(Config(model="Pop", dataset="tiny", state="INFO"))
warnings.warn_explicit("mine", UserWarning, "/home/me/mine.py", 3)
warnings.warn_explicit("theirs\\n  more", FutureWarning, {np.__file__!r}, 3)
warnings.warn_explicit("ours", FutureWarning, {logs.__file__!r}, 3)
print(file.read_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    (shown,) = done.stderr.splitlines()
    assert shown.endswith("WARNING  /home/me/mine.py:3: UserWarning: mine")
    assert [line.split(": ")[-1] for line in done.stdout.split("\n") if line] == ["mine", "theirs", "ours"]


@pytest.mark.parametrize(("state", "shown"), [("INFO", 2), ("warning", 1), ("ERROR", 0), (None, 2)])
def test_state_is_the_level(state: str | None, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = type("Config", (dict,), {"final_config_dict": {"state": state}})(model="Pop", dataset="tiny", state=state)
    file = logs.init_logging(config)
    logging.getLogger().info("one")
    logging.getLogger().warning("two")
    assert len(capsys.readouterr().err.splitlines()) == len(file.read_text().splitlines()) == shown


def test_bars_of_loading_are_hidden_and_those_of_downloads_stay_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        logs.hide_progress_bars()
        assert not transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is not stream.isatty()


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, recbole_llm.logs; sys.exit(bool({'torch', 'numpy', 'recbole', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# -- lines ---------------------------------------------------------------------------------------------------------------------


def test_metrics_line() -> None:
    assert logs.metrics_line({"hit@1": np.float64(0.48356), "mrr": 1}) == "hit@1 0.4836, mrr 1.0000"
    assert logs.metrics_line(None) == logs.metrics_line({}) == "none"


def test_configuration_line() -> None:
    assert logs.configuration_line(LLMConfig("Pop", "ml-100k")) == "configuration: all defaults"
    values = {"candidates": {"num_negatives": 5, "seed": 2020}, "topk": [1, 3, 5, 10]}
    line = logs.configuration_line(LLMConfig("Pop", "ml-100k", config_dict=values))
    assert line == "configuration: candidates={'num_negatives': 5}; defaults otherwise"
    given = LLMConfig("SASRec", "ml-100k", cmd_line=["--epochs=3", "--seed=2020", f"--note={'long ' * 50}"])
    start, note = logs.configuration_line(given).removesuffix("; defaults otherwise").split("note=")
    assert start == "configuration: epochs=3, " and len(note) == 80 and note.endswith("...")


def test_dataset_and_model_lines() -> None:
    dataset = SimpleNamespace(dataset_name="tiny", user_num=61, item_num=1041, inter_num=624, dataset_path="a/../data/tiny")
    assert logs.dataset_line(dataset) == "tiny: 60 users, 1,040 items, 624 interactions, density 1.00%, read from data/tiny"
    assert logs.model_line(torch.nn.Sequential(torch.nn.Linear(30, 40))) == "Sequential: 1,240 trainable parameters"
    assert logs.model_line("LoRACocktail on builtin: 4 of 9 parameters") == "LoRACocktail on builtin: 4 of 9 parameters"


def test_a_warning_that_is_an_error_stays_one() -> None:
    logs.init_console()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            warnings.warn("stop", stacklevel=1)
