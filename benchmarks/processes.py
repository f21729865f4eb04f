"""Runs in two processes, beside the same runs in one, and runs of which one process is killed.

``python benchmarks/processes.py --json FILE`` writes a section for ``benchmarks/reliability.py --add FILE``. The processes are
joined by gloo on this machine's CPU, as ``torchrun`` would join them; with ``--fsdp``, the LM is spread over them. The exit code
is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

from faults.world import Command, World, differing, record
from reliability import machine

MODELS = ("TALLRec", "LoRACocktail", "MoLoRec", "WeaveRec", "LlamaRec", "ALLMRec", "Laser", "AlphaRec", "Cascade", "SASRec")
MODELS += ("GRU4Rec", "BERT4Rec")
STAGELESS = ("AlphaRec", "SASRec", "GRU4Rec", "BERT4Rec")
SEQUENCES: dict[str, Any] = {"train_mode": "sequence", "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
OWN: dict[str, dict[str, Any]] = {
    "SASRec": SEQUENCES,
    "GRU4Rec": {"train_mode": "sequence", "loss_type": "BPR", "dropout_prob": 0.0},
    "BERT4Rec": SEQUENCES,
}
SIZE = 2
JOINING = 30  # seconds that a process waits at the start for one that was killed before it joined; 10 minutes by default


def several(world: World, arguments: list[str], place: Path) -> list[Command]:
    """A command in :data:`SIZE` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}

    def joining(rank: int) -> Any:
        def before() -> None:
            from recbole_llm.store import processes

            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            processes.JOINING = timedelta(seconds=JOINING)
            os.environ.update({key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})

        return before

    return [world.start(arguments, place / f"process-{rank}", joining(rank)) for rank in range(SIZE)]


def section(folder: Path, *, deaths: int, models: tuple[str, ...] = MODELS, seed: int = 0, fsdp: bool = False) -> dict[str, Any]:
    """Runs of each model in one process and in several, and ``deaths`` more of which one process is killed.

    fsdp: the LM is spread over the processes.
    """
    world, rng, rows, lost = World(folder), Random(seed), [], []
    world.warm()
    for model in models:
        own, root = OWN.get(model, {}), folder / model
        places = {name: root / name / "saved" for name in ("one", "weights", "two", "killed")}
        common = {**own, "fsdp": fsdp}
        alone = world.run(world.arguments(model, places["one"], **own), places["one"].parent)
        expected = record(places["one"])
        if alone.code or expected is None:
            raise RuntimeError(f"{model}: {alone.text}")
        if model not in STAGELESS:  # the weights that one process has trained
            shutil.copytree(places["one"] / "stages", places["weights"] / "stages")
        shared = [one.wait() for one in several(world, world.arguments(model, places["weights"], **common), root / "weights")]
        found = record(places["weights"]) or {}
        same = [one.code for one in shared] == [0] * SIZE and found.get("ranks") == expected["ranks"]
        began = time.monotonic()
        for one in several(world, world.arguments(model, places["two"], **common), root / "two"):
            one.wait()
        took, whole = time.monotonic() - began, record(places["two"])
        slowest, resumed, died = 0.0, 0, 0
        for _ in range(deaths):
            shutil.rmtree(places["killed"].parent, ignore_errors=True)
            processes = several(world, world.arguments(model, places["killed"], **common), root / "killed")
            victim = rng.randrange(SIZE)
            killed, began = processes[victim].kill_after(rng.random() * took), time.monotonic()
            died += killed
            ends = [one.wait(120) for number, one in enumerate(processes) if number != victim]
            if killed:
                slowest = max(slowest, time.monotonic() - began)
                if any(end.code != 2 for end in ends):
                    lost.append(f"{model}: the other ended with {ends[0].end}")
            last = [one.wait() for one in several(world, world.arguments(model, places["killed"], **common), root / "killed")]
            equal = whole is not None and record(places["killed"]) == whole
            resumed += equal
            if not equal:
                lost.append(f"{model}: {last[0].end}; another {', '.join(differing(whole, record(places['killed'])))}")
        if not same:
            lost.append(f"{model}: {shared[0].end}; another {', '.join(differing(expected.get('ranks'), found.get('ranks')))}")
        users = sum(len(ranks) for ranks in expected["ranks"].values())
        rows.append([model, users, users if same else 0, died, round(slowest, 1), resumed, deaths - resumed + (not same)])
        print(*rows[-1], flush=True)
    return {
        "part": "processes",
        "title": "Several processes" + (" with a sharded LM" if fsdp else ""),
        "columns": [
            *("model", "ranks", "equal to one process's", "runs with a death", "seconds until the others ended, at most"),
            *("records equal to an undisturbed run's", "lost"),
        ],
        "rows": rows,
        "notes": [
            f"{SIZE} processes, joined by gloo. Ranks: of each user in each row, by the weights that one process has trained.",
            f"{', '.join(STAGELESS)} have no stage, so {SIZE} processes train them, too, without dropout in RecBole's models.",
            "A death: one of the processes, drawn at random, is killed at a random moment, and the command started again. "
            f"One that died before it joined is waited for {JOINING} s here, and 10 minutes by default.",
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": len(lost),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the section; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--deaths", type=int, default=5, help="of each model")
    parser.add_argument("--fsdp", action="store_true", help="spread the LM over the processes")
    parser.add_argument("--models", type=lambda text: tuple(text.split(",")), default=MODELS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        found = section(Path(folder), deaths=options.deaths, models=options.models, fsdp=options.fsdp)
    shown = [argument for argument in given if not argument.startswith("--json") and argument != str(options.json)]
    about = {"command": shlex.join(["python", "benchmarks/processes.py", *shown]), "machine": machine()}
    text = json.dumps(found | about | {"date": time.strftime("%Y-%m-%d")}, indent=1)
    if options.json:
        options.json.write_text(text)
    else:
        print(text)
    return int(found["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
