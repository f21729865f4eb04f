"""Latency, throughput and memory of recommending from a run: ``python benchmarks/recommend.py``.

Makes synthetic data, and runs whose weights stay as they are initialised: what a recommendation costs does not depend on them,
but the recall of an index does, and random vectors are hard for it. Each cell is measured in a process of its own:

    load       recbole_llm.load
    index      find the vectors, and make the index
    one user   the 10 best items for one user, the median of 20
    1,000      the 10 best items for 1,000 users (--people), with a LLM behind a retriever for 20
    memory     SASRec: the 10 best items for 1,000, 10,000 and 100,000 users (--users) in turn, written to Parquet files

    python benchmarks/recommend.py                                        catalogues of 10,000, 100,000 and 1,000,000 items
    python benchmarks/recommend.py --items 10000 --models SASRec --users 1000 --json=cells.json

Times are processor seconds, which count on a busy machine; memory is the peak of the process. A call resumes: cells of ``--json``
are not measured again, and data and runs in ``--folder`` are not made again. ``--page`` writes all cells between the marks of
docs/recommend.md.
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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from data import write

SIZES = (10_000, 100_000, 1_000_000)
USERS = (1000, 10_000, 100_000)
INDEXES = ("exact", "HNSW32")
LLM_PEOPLE = 20
SMALL: dict[str, Any] = {
    "builtin_lm": {"tokens": 100_000},
    "train_samples": 64,
    "lora_epochs": 1,
    "retriever_config": {"epochs": 0},
}
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {"hidden_size": 32, "inner_size": 64},
    "BPR": {"embedding_size": 32},
    "AlphaRec": {"embedding_size": 32, "builtin_text_encoder": {"dim": 64}},
    "TALLRec": {**SMALL, "eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "eval_users": 10, "valid_users": 10},
}
LARGEST = {"TALLRec": 10_000, "AlphaRec": 100_000}  # items, whose texts are encoded; the other models rank all sizes
SETTINGS = {
    "year_field": "year",
    "category_field": "genre",
    "epochs": 0,
    "MAX_ITEM_LIST_LENGTH": 20,
    "eval_users": 100,
    "show_progress": False,
}
MARKS = "<!-- measured: written by benchmarks/recommend.py -->", "<!-- end of measured -->"
CELL = "cells: "
"""Before the lines that a part prints for :func:`alone`."""
Cells = dict[str, Any]


def make(folder: Path, model: str) -> Cells:
    """The record of a run without training."""
    from recbole_llm.quick_start import run_recbole_llm

    given = {**SETTINGS, **MODELS[model], "data_path": str(folder), "checkpoint_dir": str(folder / "saved")}
    return {"record": run_recbole_llm(model, "large", config_dict=given)["record"]}


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a function, and its processor seconds."""
    before = time.process_time()
    return work(), time.process_time() - before


def measure(record: str, index: str, people: int) -> Cells:
    """The cells of a model, a catalogue and an index."""
    import recbole_llm
    from recbole_llm import compat

    recommender, load = seconds(lambda: recbole_llm.load(record))
    found, made = seconds(lambda: recommender.index(index))
    users = recommender.users[:people]
    single = [seconds(lambda user=user: recommender.recommend(users=[user], index=index))[1] for user in users[:20]]
    table, many = seconds(lambda: recommender.recommend(users=users, index=index))
    if len(table) != 10 * len(users):
        raise RuntimeError(f"{len(table)} lines for {len(users)} users")
    return {
        "load": load,
        "index": made,
        "recall": None if found is None else found.recall,
        "one": median(single),
        "people": len(users),
        "many": many,
        "peak": compat.peak_memory_bytes(),
    }


def write_top(record: str, numbers: Sequence[int], folder: Path) -> Iterator[Cells]:
    """The 10 best items of users, written to files.

    Loading has a higher peak than recommending, which would hide what grows with users; so memory is also read between batches.
    """
    import psutil
    import pyarrow.parquet

    import recbole_llm
    from recbole_llm import compat
    from recbole_llm.recommend import output
    from recbole_llm.recommend.request import Request

    recommender = recbole_llm.load(record)
    recommender.index()
    before = compat.peak_memory_bytes()
    used = psutil.Process().memory_info
    for number in sorted(numbers):
        largest = 0

        def people() -> Iterator[Any]:
            nonlocal largest
            for place, one in enumerate(recommender.people(users)):  # noqa: B023
                largest = largest if place % 64 else max(largest, used().rss)
                yield one

        users, file = recommender.users[:number], folder / f"top-{number}.parquet"
        arguments = {"number": len(users), "show_progress": True}
        lines, spent = seconds(partial(output.write, recommender, people(), Request(), file, **arguments))
        written = pyarrow.parquet.ParquetFile(file).metadata.num_rows
        if not lines == written == 10 * len(users):
            raise RuntimeError(f"{lines} lines for {len(users)} users, {written} of them in the file")
        largest = max(largest, used().rss)
        yield {"users": len(users), "seconds": spent, "loaded": before, "used": largest, "peak": compat.peak_memory_bytes()}


def alone(part: str, folder: Path, *values: Any) -> Iterator[Cells]:
    """The results of a part in a process of its own, which runs in the folder of the data."""
    command = [sys.executable, __file__, "--part", part, *map(str, (folder, *values))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        yield from (json.loads(line.removeprefix(CELL)) for line in process.stdout if line.startswith(CELL))
    if process.returncode:
        raise SystemExit(process.returncode)


def of_part(part: str, folder: str, *values: str) -> Iterator[Cells]:
    """The other end of :func:`alone`."""
    if part == "make":
        yield make(Path(folder), *values)
    elif part == "measure":
        record, index, people = values
        yield measure(record, index, int(people))
    else:
        record, *numbers = values
        yield from write_top(record, [*map(int, numbers)], Path(folder))


def run_of(model: str, folder: Path) -> str:
    """The record of a run, made if it is not there."""
    known = folder / f"{model}.json"
    if not known.is_file():
        known.write_text(json.dumps(next(iter([*alone("make", folder, model)]))))
    return json.loads(known.read_text())["record"]


def measured(options: argparse.Namespace, known: Cells, keep: Callable[[str, str, Cells], None]) -> None:
    """Measure all cells that are not ``known``; ``keep`` takes each one when it is there, by the table and the row."""
    for items in options.items:
        largest = items == max(options.items)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) if options.folder is None else options.folder / str(items)
            if not (folder / "large").is_dir():
                users = max(2 * options.people, *(options.users if largest else ()), items // 8)
                write(folder, "large", 20 * users, items, covered=True)
            for model in options.models:
                if items > LARGEST.get(model, items):
                    continue
                numbers = options.users if largest and model == "SASRec" else ()
                if any(f"{items} {number}" not in known["memory"] for number in numbers):
                    for cells in alone("write", folder, run_of(model, folder), *numbers):
                        keep("memory", f"{items} {cells['users']}", cells)
                people = LLM_PEOPLE if model == "TALLRec" else options.people
                for index in INDEXES:
                    if (row := f"{model} {items} {index}") not in known["speed"]:
                        for cells in alone("measure", folder, run_of(model, folder), index, people):
                            keep("speed", row, cells)


def _row(name: str, cells: Cells) -> list[str]:
    model, items, index = name.split()
    recall = "" if cells["recall"] is None or index == "exact" else f"{cells['recall']:.3f}"
    times = [f"{cells['load']:.1f} s", f"{cells['index']:.1f} s", f"{1000 * cells['one']:.0f} ms"]
    times.append(f"{cells['people'] / cells['many']:,.0f}")
    return [f"{int(items):,}", model, index, *times, recall, f"{cells['peak'] / 2**30:.2f} GiB"]


def tables(found: dict[str, Any]) -> list[str]:
    """The cells as two Markdown tables, and how they were measured."""
    from tabulate import tabulate

    def order(name: str) -> tuple[int, int, int]:
        model, items, index = name.split()
        return int(items), [*MODELS].index(model), INDEXES.index(index)

    head = ["items", "model", "index", "load", "make the index", "one user", "users a second", "recall@10", "peak memory"]
    speed = [_row(name, found["speed"][name]) for name in sorted(found["speed"], key=order)]
    memory = [
        [f"{int(items):,}", f"{cells['users']:,}", f"{cells['seconds']:.0f} s"]
        + [f"{cells[key] / 2**30:.2f} GiB" for key in ("used", "loaded", "peak")]
        for (items, _), cells in sorted((tuple(map(int, name.split())), cells) for name, cells in found["memory"].items())
    ]
    lines = [tabulate(speed, head, tablefmt="github", disable_numparse=True), ""]
    if memory:
        columns = ["items", "users", "seconds", "memory between batches, at most", "peak of loading", "peak"]
        lines += ["Ten items for each of many users, by SASRec, written to a Parquet file:", ""]
        lines += [tabulate(memory, columns, tablefmt="github", disable_numparse=True), ""]
    return [*lines, *(f"`{call['command']}`: {call['machine']}, {call['date']}." for call in found["calls"])]


def kept(file: Path | None) -> dict[str, Any]:
    """The cells of earlier calls, or of others that run at the same time."""
    if file is None or not file.is_file():
        return {"speed": {}, "memory": {}, "calls": []}
    return json.loads(file.read_text())


def write_page(page: Path, found: dict[str, Any]) -> None:
    """Replace what stands between the marks of a page."""
    first, last = MARKS
    before, _, rest = page.read_text().partition(first)
    _, _, after = rest.partition(last)
    page.write_text("\n".join([before + first, "", *tables(found), "", last + after]))


def main(arguments: list[str] | None = None) -> None:
    import psutil

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[*SIZES], help="sizes of the catalogue")
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--people", type=int, default=1000, help="users of the column users a second")
    parser.add_argument(
        "--users", type=int, nargs="*", default=[*USERS], help="users of the table of memory, of the largest catalogue"
    )
    parser.add_argument("--folder", type=Path, help="where data and runs stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file of the cells, in which those of other calls stay")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the cells between the marks of this page")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    options.folder = options.folder and options.folder.resolve()
    if options.part:
        for cells in of_part(*options.part):
            print(CELL + json.dumps(cells), flush=True)
        return
    measures = {"items": options.items, "models": options.models, "people": [options.people], "users": options.users}
    shown = [str(value) for name, values in measures.items() for value in (f"--{name}", *values)]
    call = {
        "command": shlex.join(["python", "benchmarks/recommend.py", *shown]),
        "machine": f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB",
        "date": time.strftime("%Y-%m-%d"),
    }
    found = kept(options.json)

    def keep(table: str, row: str, cells: Cells) -> None:
        nonlocal found
        found = found if options.json is None else kept(options.json)
        found[table][row] = cells
        found["calls"] = [*(other for other in found["calls"] if other["command"] != call["command"]), call]
        print(table, row, json.dumps(cells), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    measured(options, kept(options.json), keep)
    if options.page:
        write_page(options.page, found)
    print(*tables(found), sep="\n")


if __name__ == "__main__":
    main()
