"""The first command of the README: from scratch, again with its stages kept, and ``--help``.

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


def main() -> None:
    given = sys.argv[1:]
    arguments = [*given, *(f"--{key}={value}" for key, value in DEFAULTS.items() if f"--{key}=" not in " ".join(given))]
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = timed(["--help"], folder)
        print(json.dumps({"what": "--help", "seconds": round(seconds, 2), "bar": 2}), flush=True)
        first, memory = timed(arguments, folder)
        print(json.dumps({"what": "first run", "arguments": arguments, "seconds": round(first, 1), "peak_gib": round(memory, 2), "bar": 480}), flush=True)
        again, memory = timed(arguments, folder)
        record = json.loads(next(Path(folder).glob("saved/runs/*/record.json")).read_text())
        print(json.dumps({"what": "stages of the last run", "seconds": record["stage_seconds"]}))
        print(json.dumps({"what": "again, stages kept", "seconds": round(again, 1), "peak_gib": round(memory, 2), "ratio": round(again / first, 3), "bar": 60}))


DEFAULTS = {"model": "LoRACocktail", "dataset": "ml-100k"}

if __name__ == "__main__":
    main()
