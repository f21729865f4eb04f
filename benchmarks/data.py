"""Time and memory of reading a data set, splitting it and drawing candidates: ``python benchmarks/data.py``.

Makes synthetic atomic files in a temporary folder: interactions of users with histories of 10 to 30 items, a skewed popularity,
times in seconds, and a title, a year and a category for each item. Each size then runs in a process of its own, as a run does:

    python benchmarks/data.py                                     100,000, 300,000 and 1 million interactions, for SASRec and BPR
    python benchmarks/data.py --interactions=10000000 --model=SASRec

There is an item for each 10 interactions and a user for each 20. A line gives the size, processor seconds of each step, their sum
per million interactions, wall-clock seconds and peak memory. On a busy machine processor seconds are what counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

STEPS = ("read", "split", "candidates")
_WORDS = [
    "red",
    "blue",
    "green",
    "old",
    "new",
    "river",
    "house",
    "wolf",
    "train",
    "song",
    "winter",
    "king",
    "sea",
    "stone",
    "light",
    "glass",
    "road",
    "night",
    "field",
    "clock",
]


def write(
    folder: Path,
    name: str,
    interactions: int,
    items: int | None = None,
    seed: int = 0,
    *,
    covered: bool = False,
    length: int = 20,
) -> None:
    """Write a data set of about ``interactions`` rows, in blocks, so that its size is not held in memory.

    Args:
        items: number of items; None: one for each 10 interactions.
        length: of a history on average, an even number; a history has from half of it to one and a half times as many rows.
        covered: each item has an interaction, so that none is left out; needs twice as many interactions as items.
    """
    rng = np.random.default_rng(seed)
    users, items = max(2, interactions // length), items or max(40, interactions // 10)
    (folder / name).mkdir(parents=True)
    with open(folder / name / f"{name}.item", "w") as file:
        file.write("item_id:token\ttitle:token_seq\tyear:token\tgenre:token_seq\n")
        words = np.array(_WORDS)[rng.integers(len(_WORDS), size=(items, 4))]
        for item, (a, b, c, d) in enumerate(words.tolist()):
            file.write(f"B{item:08d}\tThe {a} {b} and the {c} {d} {item}\t{1950 + item % 70}\t{d} film\n")
    uncovered = rng.permutation(items) if covered else np.empty(0, dtype=np.int64)
    with open(folder / name / f"{name}.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for block in np.array_split(np.arange(users), max(1, users // 20_000)):
            lengths = rng.integers(length // 2, length + length // 2 + 1, size=len(block))
            own = np.repeat(block, lengths)
            popular = (items * rng.random(len(own)) ** 2).astype(np.int64)
            some, uncovered = uncovered[: len(own[::2])], uncovered[len(own[::2]) :]
            popular[::2][: len(some)] = some
            times = 1_500_000_000 + rng.integers(10**8, size=len(own))
            file.writelines(f"A{u:07d}\tB{i:08d}\t{t}\n" for u, i, t in zip(own, popular, times, strict=True))


def measure(folder: Path, name: str, model: str) -> dict[str, float]:
    """Processor seconds of each step, wall-clock seconds and peak memory of this process."""
    from recbole_llm import compat
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.candidate_sets import candidate_sets
    from recbole_llm.data.loading import create_dataset, data_preparation

    seconds: dict[str, float] = {}

    @contextmanager
    def step(key: str) -> Iterator[None]:
        before = time.process_time()
        yield
        seconds[key] = time.process_time() - before
        print(f"{key}: {seconds[key]:.1f} s, {compat.peak_memory_bytes() / 2**30:.2f} GiB", file=sys.stderr)

    given = {"data_path": str(folder), "checkpoint_dir": str(folder / model), "year_field": "year", "category_field": "genre"}
    config = LLMConfig(model, name, config_dict=given)
    began = time.monotonic()
    with step("read"):
        dataset = create_dataset(config)
    with step("split"):
        train, _, _ = data_preparation(config, dataset)
    with step("candidates"):
        sets = candidate_sets(config, dataset)
        drawn = sum(len(found.items) for found in sets.values())
    return {
        **seconds,
        "wall": time.monotonic() - began,
        "peak": compat.peak_memory_bytes() / 2**30,
        "rows": len(train._dataset),
        "drawn": drawn,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--model", nargs="+", default=["SASRec", "BPR"])
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        folder, name = options.one
        print(json.dumps(measure(Path(folder), name, options.model[0])))
        return
    columns = [*(f"{key} s" for key in STEPS), "s per million", "wall s", "peak GiB"]
    print(f"{'model':8} {'interactions':>12} " + "".join(f"{column:>14}" for column in columns))
    for number in options.interactions:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), "large", number)
            for model in options.model:
                command = [sys.executable, __file__, f"--model={model}", "--one", place, "large"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                seconds = [found[key] for key in STEPS]
                values = [*seconds, sum(seconds) / number * 1e6, found["wall"], found["peak"]]
                print(f"{model:8} {number:12,} " + "".join(f"{value:14.2f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
