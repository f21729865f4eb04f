"""The first command of the README: from scratch, again with its stages cached, and ``--help``.

Prints one JSON line a measurement: wall seconds, peak memory of the process, and the ratio of the second run to the first.

    python benchmarks/main_job.py [--model=LoRACocktail] [--dataset=ml-100k] [any --key=value of run_recbole_llm.py]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "run_recbole_llm.py"


def timed(arguments: list[str], folder: str) -> tuple[float, float]:
    """Wall seconds and peak memory (GiB) of one run of the script in ``folder``; its output goes to ``folder``/output."""
    with open(Path(folder) / "output", "a") as output:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=folder, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"run_recbole_llm.py {' '.join(arguments)} failed:\n{(Path(folder) / 'output').read_text()[-3000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def show(what: str, **facts: object) -> None:
    """One measurement as one JSON line."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in facts.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


def main() -> None:
    given = sys.argv[1:]
    arguments = [*given, *(f"--{key}={value}" for key, value in DEFAULTS.items() if f"--{key}=" not in " ".join(given))]
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = timed(["--help"], folder)
        show("--help", seconds=seconds, bar=1)
        first, memory = timed(arguments, folder)
        show("first run", arguments=arguments, seconds=first, peak_gib=memory, bar=300)
        again, memory = timed(arguments, folder)
        show("again, stages cached", seconds=again, peak_gib=memory, ratio=again / first, bar=15)


DEFAULTS = {"model": "LoRACocktail", "dataset": "ml-100k"}

if __name__ == "__main__":
    main()
