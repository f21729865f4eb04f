"""Time and memory of a run on large data, step by step: ``python benchmarks/load.py``.

Makes synthetic atomic files in a temporary folder, of about 20 interactions of each user. Each size runs in a process of its own:

    load        read the files, filter and split them
    candidates  draw, write and read the candidates of validation and test
    epoch       train SASRec for one epoch on whole sequences, with a sampled softmax over 256 items
    evaluation  rank the candidates of at most 100,000 test users with that SASRec
    top 10      in another process: the 10 best items for 1,000 users by the product of unit vectors, as encoders such as Laser
                recommend them, with faiss's exact index; the vectors are random

    python benchmarks/load.py                                          from 10,000 to 100,000 users and items
    python benchmarks/load.py --sizes 1000000x1000000 --json=load.json     USERSxITEMS; 20 million interactions

A cell has the processor seconds of a step, and the peak memory of the process until its end. On a busy machine processor seconds
are what counts. ``--json`` writes the table as a section for ``benchmarks/reliability.py --add``.

With ``--models``, it shows instead whether the memory of LLM models grows while they train and evaluate, on data of ml-1m's size:

    python benchmarks/load.py --models --json=memory.json               all of them
    python benchmarks/load.py --models TALLRec Laser --samples=2000 --evaluated=1000
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import load_models
import numpy as np
from data import write

STEPS = ("load", "candidates", "epoch", "evaluation", "top 10")
SIZES = ("10000x10000", "100000x10000", "10000x100000", "100000x100000")
SETTINGS = {
    "year_field": "year",
    "category_field": "genre",
    "epochs": 1,
    "MAX_ITEM_LIST_LENGTH": 20,
    "train_batch_size": 32_768,
    "sequence_loss": "sampled_softmax",
    "show_progress": False,
}
Cell = tuple[float, float]


class Steps:
    """Processor seconds of each step, and the peak memory of this process until its end, in GiB."""

    def __init__(self) -> None:
        self.found: dict[str, Cell] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        from recbole_llm import compat

        before = time.process_time()
        yield
        self.found[name] = time.process_time() - before, compat.peak_memory_bytes() / 2**30
        print(f"{name}: {self.found[name][0]:.1f} s, {self.found[name][1]:.2f} GiB", file=sys.stderr)


def run(folder: Path, name: str, evaluated: int) -> dict[str, Cell]:
    """All steps but the last one."""
    from recbole_llm.classical.train_modes import trainer_class
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.candidate_sets import candidate_sets
    from recbole_llm.data.loading import create_dataset, data_preparation

    step = Steps()
    given = {**SETTINGS, "data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "eval_users": evaluated}
    config = LLMConfig("SASRec", name, config_dict=given)
    with step("load"):
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
    with step("candidates"):
        sets = candidate_sets(config, dataset)
        valid.candidates, test.candidates = (sets[phase] for phase in ("valid", "test"))
        if len(test.candidates.items) != min(evaluated, len(dataset.histories.evaluated("test"))):
            raise RuntimeError(f"{len(test.candidates.items)} users have candidates")
    model = config.model_class(config, train._dataset).to(config["device"])
    trainer = trainer_class(config)(config, model)
    with step("epoch"):
        trainer._train_epoch(train, 0)
    trainer.eval_collector.data_collect(train)
    with step("evaluation"):
        trainer.evaluate(test, load_best_model=False)
        if len(trainer.ranks.users) != len(test.candidates.users):
            raise RuntimeError(f"{len(trainer.ranks.users)} users have a rank")
    return step.found


def recommend(users: int, items: int, width: int) -> dict[str, Cell]:
    """The last step."""
    import torch

    from recbole_llm.model.encoder import LLMEncoder

    step = Steps()
    matrix = torch.nn.functional.normalize(torch.randn(items + 1, width, generator=torch.Generator().manual_seed(0)), dim=1)
    encoder: Any = SimpleNamespace(item_matrix=matrix, encode_users=lambda wanted: matrix[wanted])
    wanted = torch.from_numpy(np.random.default_rng(0).integers(1, items + 1, size=users))
    with step("top 10"):
        _, found = LLMEncoder.recommend(encoder, wanted, 10)
    if not torch.equal(found[:, 0], wanted):  # a vector of unit length is nearest to itself
        raise RuntimeError("the index found other items than the nearest ones")
    return step.found


def measured(size: tuple[int, int], options: argparse.Namespace) -> dict[str, Cell]:
    """The cells of a size; each part in a process of its own."""
    users, items = size
    found: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        write(Path(place), "large", 20 * users, items)
        for part in ("run", "recommend"):
            values = [f"--evaluated={options.evaluated}", f"--width={options.width}"]
            command = [sys.executable, __file__, *values, "--one", part, place, str(items)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=place)
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def section(options: argparse.Namespace) -> dict[str, Any]:
    """The table of all sizes, as ``benchmarks/reliability.py`` takes it; prints each row when it is known."""
    rows: list[list[str]] = []
    print(f"{'users':>10} {'items':>10} " + "".join(f"{name:>20}" for name in STEPS))
    for size in options.sizes:
        found = measured(size, options)
        cells = [f"{found[name][0]:.1f} s, {found[name][1]:.2f} GiB" for name in STEPS]
        rows.append([f"{number:,}" for number in size] + cells)
        print(f"{size[0]:10,} {size[1]:10,} " + "".join(f"{cell:>20}" for cell in cells), flush=True)
    return {
        "part": "load",
        "title": "Large data",
        "columns": ["users", "items", *STEPS],
        "rows": rows,
        "notes": [
            "Processor seconds of each step, and the peak memory of its process until then. Each user has about 20 interactions.",
            "Epoch: SASRec on whole sequences, sampled softmax. "
            f"Evaluation: at most {options.evaluated:,} users, 20 candidates each. "
            f"Top 10: 1,000 users, random vectors of width {options.width}, faiss's exact index.",
        ],
    }


def without_places(given: list[str]) -> list[str]:
    """Arguments without those that say where files go on this machine."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--json")
    places.add_argument("--folder")
    return places.parse_known_args(given)[1]


def measurement(given: list[str]) -> dict[str, Any]:
    """How and where a section was measured."""
    import psutil

    return {
        "command": shlex.join(["python", "benchmarks/load.py", *without_places(given)]),
        "machine": f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB",
        "date": time.strftime("%Y-%m-%d"),
        "lost": 0,
    }


def size(text: str) -> tuple[int, int]:
    """``USERSxITEMS``."""
    users, _, items = text.partition("x")
    return int(users), int(items)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="+", default=[*map(size, SIZES)], metavar="USERSxITEMS")
    parser.add_argument("--models", nargs="*", choices=load_models.MODELS, metavar="MODEL", help="show the memory of LLM models")
    parser.add_argument("--samples", type=int, default=2000, help="training examples of each adapter or phase of --models")
    parser.add_argument("--evaluated", type=int, help="test users who are evaluated, at most (default: 100,000; --models: 1,000)")
    parser.add_argument("--users", type=int, default=load_models.USERS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=384, help="of the vectors of top 10")
    parser.add_argument("--folder", type=Path, help="where the temporary files are (default: the system's folder)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--one", nargs=3, metavar=("PART", "FOLDER", "ITEMS"), help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.one:
        part, folder, items = options.one
        cells = run(Path(folder), "large", options.evaluated) if part == "run" else recommend(1000, int(items), options.width)
        print(json.dumps(cells))
        return
    options.evaluated = options.evaluated or (100_000 if options.models is None else 1000)
    if options.models is None:
        found = section(options)
    else:
        models = options.models or load_models.MODELS
        found = load_models.section(models, options.samples, options.evaluated, options.users, options.folder)
    found |= measurement(given)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
