"""A tiny data set and LM, the ones of the tests, and whole commands on them in forked children, which die or fail alone."""

from __future__ import annotations

import faulthandler
import fcntl
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = {"checksum", "commit", "written", "config", "plan", "checkpoint"}  # a checkpoint has a name of its own each time
MEASURED = {"seconds", "cpu_seconds", "users_per_second", "peak_memory_bytes", "stage_seconds"}
"""What a record says about one execution, itself or in its parts; all else follows from the command."""
LONGEST = 600.0
"""Seconds of a command; one takes seconds, on a loaded machine a minute."""
OWN: dict[str, dict[str, Any]] = {  # what the settings of the tests say and a model cannot do, or need not
    "LlamaRec": {"lora_train_mode": "prefix"},
    "Laser": {"warmup_epochs": 1},
    "Cascade": {"llm_ranker": "TALLRec"},
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        seconds: of processor time; too many if others ended at the same time.
        text: what it wrote to the terminal.
    """

    code: int
    seconds: float
    text: str

    @property
    def error(self) -> str | None:
        """The one line in which it ended, if it ended so: exit code 2, one line ``error: ...``, and no traceback."""
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return lines[0] if self.code == 2 and len(lines) == 1 and "Traceback" not in self.text else None

    @property
    def end(self) -> str:
        """Its exit code and last line, for reports."""
        return f"exit code {self.code}, {' '.join(self.text.strip().splitlines()[-1:])[:300]}"


class World:
    """The data set ``tiny``, a random LM and settings with which any model runs in a second, in a folder."""

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "conftest.py")
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(tiny := importlib.util.module_from_spec(spec))
        self.folder = folder
        data = tiny.write_dataset(folder / "data")
        tiny.write_predictions(data / "predictions.csv")
        lm = tiny.write_lm(folder / "lm" / "tiny-llama")
        self.settings = tiny.tiny_settings(data, lm, folder) | {"use_gpu": False, "save_every_seconds": 0}

    def arguments(self, model: str, saved: Path, **changes: Any) -> list[str]:
        """The arguments of a run; its settings are a property file beside ``saved``."""
        file = saved.with_name(f"{saved.name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**self.settings, **OWN.get(model, {}), **changes, "checkpoint_dir": str(saved)}))
        return ["run", f"--model={model}", "--dataset=tiny", f"--config_files={file}"]

    def start(self, arguments: Sequence[str], place: Path, before: Callable[[], Any] = lambda: None) -> Command:
        """Start a command in a child process that stands in ``place``; ``before`` is called there first."""
        place.mkdir(parents=True, exist_ok=True)
        return Command(arguments, place, before)

    def run(self, arguments: Sequence[str], place: Path, before: Callable[[], Any] = lambda: None) -> Outcome:
        """A command from beginning to end."""
        return self.start(arguments, place, before).wait()

    def whole(self, model: str, before: Callable[[], Any] = lambda: None) -> tuple[Path, Outcome, dict[str, Any]]:
        """An undisturbed run in a folder of its own: its ``saved``, how it ended, and its record.

        Raises:
            RuntimeError: it failed.
        """
        saved = self.folder / model / "whole" / "saved"
        outcome = self.run(self.arguments(model, saved), saved.parent, before)
        found = record(saved)
        if outcome.code or found is None:
            raise RuntimeError(f"{model}: {outcome.text}")
        return saved, outcome, found

    def warm(self) -> None:
        """Import and read what runs import and read, so that the children need not: half of a tiny run."""
        import matplotlib.figure  # noqa: F401
        import recbole.model.sequential_recommender  # noqa: F401
        import sentence_transformers  # noqa: F401
        import torch

        import recbole_llm
        from recbole_llm.llm.causal_lm import load_causal_lm
        from recbole_llm.llm.lora import attach_lora
        from recbole_llm.store.code import code_fingerprint

        modules = [module.name for module in pkgutil.walk_packages(recbole_llm.__path__, "recbole_llm.")]
        for name in modules:
            importlib.import_module(name)
        code_fingerprint(*modules)  # the code is that of this process, also if its files change
        torch.set_num_threads(1)
        lm = load_causal_lm(Path(self.settings["llm_path"])).model
        attach_lora(lm, name="warm", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], seed=0)


class Command:
    """A command of the command line in a forked child.

    Attributes:
        failed: it had ended with an error before it could be killed.
    """

    failed = False

    def __init__(self, arguments: Sequence[str], place: Path, before: Callable[[], Any]):
        self._before = _work_of_children()
        # a file would have the limits of the child, and a thread that reads could leave a fork a lock that nobody opens
        self._read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2**20)  # more than a run writes

        def child() -> None:
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.chdir(place)
            from tqdm import tqdm

            from recbole_llm import cli

            # tqdm's lock is one for all forked processes: with it, a killed child would stop all later ones
            tqdm.set_lock(threading.RLock())
            faulthandler.dump_traceback_later(LONGEST - 10, exit=True)  # says where a child hangs
            code = 0
            try:
                before()
                cli.main(arguments)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            finally:
                sys.stderr.flush()
                os._exit(code)

        self._process = multiprocessing.get_context("fork").Process(target=child)
        self._process.start()
        os.close(write)

    def kill_after(self, seconds: float) -> bool:
        """Kill it at a moment, wherever it is; False if it had ended."""
        self._process.join(seconds)
        return self._kill()

    def kill_after_work(self, seconds: float) -> bool:
        """Kill it after so much processor time, which is the same place however busy the machine is; False if it had ended."""
        over = time.monotonic() + LONGEST
        process = psutil.Process(self._process.pid)
        while self._process.is_alive() and sum(process.cpu_times()[:2]) < seconds and time.monotonic() < over:
            time.sleep(0.003)
        return self._kill()

    def _kill(self) -> bool:
        self._process.kill()
        self._process.join()
        self.failed = self._process.exitcode not in (0, -signal.SIGKILL)
        os.close(self._read)
        return self._process.exitcode == -signal.SIGKILL

    def wait(self, seconds: float = LONGEST) -> Outcome:
        """Its end; a command that takes longer is killed."""
        text, over = b"", time.monotonic() + seconds
        while select.select([self._process.sentinel, self._read], [], [], max(0.0, over - time.monotonic()))[0] == [self._read]:
            part = os.read(self._read, 2**20)
            text += part
            if not part:
                break
        self._process.join(max(0.0, over - time.monotonic()))
        self._process.kill()
        self._process.join()
        os.set_blocking(self._read, False)  # a child of the child may still hold the other end
        with os.fdopen(self._read, "rb", buffering=0) as stream:
            while part := stream.read(2**20):
                text += part
        seconds = _work_of_children() - self._before
        return Outcome(int(self._process.exitcode or 0), seconds, text.decode(errors="replace"))


def _work_of_children() -> float:
    """Processor seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """The first places in which two records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [differing(one.get(key), other.get(key), f"{place}/{key}") for key in sorted({**one, **other})]
        return [found for part in parts for found in part][:3]
    return [] if one == other else [place]


def record(saved: Path) -> dict[str, Any] | None:
    """What the one record below a folder says about the result; None without a record."""
    files = list(saved.glob("runs/*/record.json"))
    if len(files) != 1:
        return None
    return {key: value for key, value in _unmeasured(json.loads(files[0].read_text())).items() if key not in VARIABLE}


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(part) for key, part in value.items() if key not in MEASURED}
    return [_unmeasured(part) for part in value] if isinstance(value, list) else value
