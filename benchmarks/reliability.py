"""Faults on purpose, counted: ``python benchmarks/reliability.py kills damages disk hostile`` writes docs/reliability.md.

Each part writes its section into ``docs/reliability.json``, from which the page is made; ``--add FILE`` takes a section that
another benchmark has written. The exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from faults import damages, disk, hostile, kills
from faults.page import page
from faults.world import ROOT

KEYS = ("part", "title", "columns", "rows", "notes", "command", "machine", "date")


def machine() -> str:
    """Its size, without its name."""
    return f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB"


PARTS = ("kills", "damages", "disk", "hostile")


def add(file: Path, found: dict[str, Any]) -> None:
    """Put a section into the file of results, in place of an earlier one of its part, and write the page anew."""
    if missing := [key for key in KEYS if key not in found]:
        raise SystemExit(f"a section needs {', '.join(missing)}")
    sections = json.loads(file.read_text()) if file.is_file() else {}
    sections[found["part"]] = found
    file.write_text(json.dumps(sections, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    file.with_suffix(".md").write_text(page(sections))


def main(arguments: list[str] | None = None) -> int:
    """Run parts by name; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--kills", type=int, default=20, help="runs of each model that are killed")
    parser.add_argument("--restarts", type=int, default=3, help="kills of each of them")
    parser.add_argument(
        "--models", type=lambda text: tuple(text.split(",")), help="such as TALLRec,Pop (default: those of the part)"
    )
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--inputs", type=int, default=500, help="hostile inputs of each kind")
    parser.add_argument("--disks", type=int, default=30, help="failing disks of each sort and model")
    parser.add_argument(
        "--add", type=Path, action="append", default=[], metavar="FILE", help="JSON of a section of another benchmark"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each part; what was not run by then is not counted")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if unknown := [part for part in options.parts if part not in PARTS]:  # choices of "*" refuse that none is given
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    own: dict[str, Any] = {"seed": options.seed, **({"models": options.models} if options.models else {})}
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "kills": partial(kills.section, kills=options.kills, restarts=options.restarts, **own),
        "damages": partial(damages.section, number=options.damages, **own),
        "disk": partial(disk.section, most=options.disks, **own),
        "hostile": partial(hostile.section, number=options.inputs, seed=options.seed),
    }
    lost = 0
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = parts[name](Path(folder), until=time.monotonic() + 60 * options.minutes)
        others = [argument for argument in given if argument not in options.parts and not argument.startswith(("--add", "--out"))]
        command = shlex.join(["python", "benchmarks/reliability.py", name, *others])
        add(options.out, found | {"command": command, "machine": machine(), "date": time.strftime("%Y-%m-%d")})
        lost += found["lost"]
        print(f"{name}: {found['lost']} lost", *found["notes"], sep="\n  ", flush=True)
    for file in options.add:
        add(options.out, json.loads(file.read_text()))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
