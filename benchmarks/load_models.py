"""Memory of LLM recommenders over time, on data of ml-1m's size, for ``python benchmarks/load.py --models``.

Each model is trained and evaluated in a process of its own, with the random LM and the settings of the tests, so that what grows
is not hidden behind weights. After each step of an optimiser and each batch of evaluation users, the peak of the resident memory
since the step or batch before is noted.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import write

MODELS = ("TALLRec", "LoRACocktail", "MoLoRec", "WeaveRec", "LlamaRec", "ALLMRec", "Laser", "AlphaRec")
USERS, ITEMS, INTERACTIONS = 6_040, 3_706, 1_000_209
QUARTERS = ("25 %", "50 %", "75 %", "100 %")
EVALUATION = "evaluation"
_BATCHES = 40  # of an evaluation
_ROOT = Path(__file__).resolve().parent.parent
_SETTINGS = {  # in place of those of the tests, which are for 60 users
    "use_gpu": False,
    "candidates": {"num_negatives": 19},
    "max_history": 10,
    "train_batch_size": 4096,
    "lora_epochs": 1,
    "general_epochs": 1,
    "stage1_epochs": 1,
    "stage2_epochs": 1,
    "phase1_epochs": 1,
    "weave_controls": [],
    "domain_max_views": 2,
    "merge_steps": 10,
}
_OWN: dict[str, dict[str, Any]] = {  # prompts of 512 tokens at most
    "LlamaRec": {"lora_train_mode": "prefix", "max_title_tokens": 8},
    "Laser": {"max_history": 6},
}
_CF = {"train_batch_size": 512, "sequence_loss": "sampled_softmax"}

Parts = dict[str, list[float]]
"""Peaks of the resident memory in MiB in the order of time, by stage and of the evaluation."""


def peak() -> float:
    """The peak of this process's resident memory since the last call, in MiB; its present size where a system has no peaks."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size again
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


def quarters(peaks: Sequence[float]) -> list[float]:
    """The peak of each quarter of four values or more."""
    return [float(part.max()) for part in np.array_split(np.array(peaks), 4)]


def run(model: str, folder: Path, samples: int, evaluated: int, users: int) -> Parts:
    """Train a model on the data set ``large`` in a folder, and evaluate it.

    Args:
        samples: training examples of each adapter or phase, at most.
        evaluated: test users.
        users: of the data set.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from recbole_llm.config import LLMConfig
    from recbole_llm.data import loading
    from recbole_llm.quick_start import assemble
    from recbole_llm.store.stages import in_order

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("tests_conftest", _ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(tests := importlib.util.module_from_spec(spec))
    given = tests.tiny_settings(folder, tests.write_lm(folder / "lm"), folder) | _SETTINGS | _OWN.get(model, {})
    bounded = dict.fromkeys(("train_samples", "general_samples", "weave_samples", "stage1_samples"), samples)
    loading.PAIRS, loading.USERS = 1, max(1, users // _BATCHES)  # general models have large batches otherwise
    bounded |= {"eval_users": evaluated, "valid_users": min(evaluated, 200), "eval_batch_size": loading.USERS}
    config = LLMConfig(model, "large", config_dict=given | bounded | {"cf_config": {**given["cf_config"], **_CF}})
    found: Parts = {}
    part = "training"
    run = assemble(config)

    def noted(*_: Any) -> None:
        found.setdefault(part, []).append(peak())

    hook = register_optimizer_step_post_hook(noted)
    for stage in in_order(run.stages):
        part = stage.name
        peak()
        run.trainer.cache.run(stage)
    part = "training"
    peak()
    run.trainer.fit(run.train, run.valid)
    hook.remove()
    part = EVALUATION
    of_batch = run.trainer._full_sort_batch_eval

    def evaluate_batch(batch: Any) -> Any:
        result = of_batch(batch)
        noted()
        return result

    run.trainer._full_sort_batch_eval = evaluate_batch
    peak()
    run.trainer.evaluate(run.test, load_best_model=False)
    if len(run.trainer.ranks.users) != evaluated:
        raise RuntimeError(f"{len(run.trainer.ranks.users)} of {evaluated} users have a rank")
    return {name: peaks for name, peaks in found.items() if len(peaks) >= len(QUARTERS)}


def measured(model: str, folder: Path, *numbers: int) -> Parts:
    """:func:`run` in a process of its own; ``numbers`` are its last arguments."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / "large").symlink_to((folder / "large").resolve())
        command = [sys.executable, __file__, model, place, *map(str, numbers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=place)
        found: Parts = json.loads(done.stdout.splitlines()[-1])
        return found


def section(models: Sequence[str], samples: int, evaluated: int, users: int, place: Path | None) -> dict[str, Any]:
    """The table of some models, as ``benchmarks/reliability.py`` takes it; prints each row when it is known.

    Args:
        users: of the data; fewer than those of ml-1m for a trial.
        place: where the temporary files are; None: the system's folder.
    """
    length = INTERACTIONS // USERS // 2 * 2
    columns = ["model", "part", "steps or users", *QUARTERS, "growth"]
    rows: list[list[str]] = []
    print(" ".join(f"{name:>20}" for name in columns))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        write(Path(folder), "large", users * length, ITEMS, length=length)
        for model in models:
            for part, peaks in measured(model, Path(folder), samples, evaluated, users).items():
                found = quarters(peaks)
                number = evaluated if part == EVALUATION else len(peaks)
                cells = [f"{value:,.0f} MiB" for value in found]
                rows.append([model, part, f"{number:,}", *cells, f"{found[-1] - found[0]:+,.1f} MiB"])
                print(" ".join(f"{cell:>20}" for cell in rows[-1]), flush=True)
    return {
        "part": "memory",
        "title": "Memory of LLM recommenders over time",
        "columns": columns,
        "rows": rows,
        "notes": [
            f"{users:,} users, {ITEMS:,} items and about {users * length:,} interactions, some of them repeats, with made-up "
            "titles; a random LM of a few thousand weights. Each model runs in a process of its own.",
            "A cell is the peak of the resident memory in a quarter of the steps of a stage, or of the evaluation users. "
            "Growth: the last quarter minus the first one.",
            f"At most {samples:,} training examples of an adapter or phase, {evaluated:,} test users, 20 candidates each.",
        ],
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))))
