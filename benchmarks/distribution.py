"""The package as people install it: built, checked, installed in a new environment, and run there without a checkout.

    pip install twine && python benchmarks/distribution.py --work=DIR

``PIP_CONSTRAINT=constraints.txt`` takes the tested versions. Arguments of the run follow ``--``, in place of those of
:data:`RUN`. The exit code is 1 if a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--model=LoRACocktail", "--dataset=ml-100k", "--eval_users=100"]
BUILD = "import setuptools.build_meta as backend; backend.build_sdist('..'); backend.build_wheel('..')"


def tracked() -> list[str]:
    """Paths of the files of the checkout, without those that git ignores; of new ones, too."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in output.split("\0") if path and (ROOT / path).is_file())


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source distribution and the wheel from a copy of the checkout below ``folder``; returns both files."""
    checkout = folder / "checkout"
    for path in tracked():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def clean() -> dict[str, str]:
    """The environment variables without those that lead Python to other packages than the installed ones."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def main(arguments: list[str] | None = None) -> int:
    """Do every step; print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder, which must not exist")
    parser.add_argument("run", nargs="*", default=RUN, help="arguments of recbole-llm run")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True)
    files = build(work)
    scripts, empty = work / "venv" / ("Scripts" if os.name == "nt" else "bin"), work / "empty"
    empty.mkdir()
    venv.create(work / "venv", with_pip=True)
    pip, command = [scripts / "python", "-m", "pip", "install", "-q"], scripts / "recbole-llm"
    steps = {
        "twine": [sys.executable, "-m", "twine", "check", "--strict", *files],
        "install": [*pip, files[1]],
        "recbole": [*pip, "--no-deps", "recbole==1.2.1"],
        "doctor": [command, "doctor"],
        "run": [command, "run", *options.run],
    }
    for name, line in steps.items():
        began = time.monotonic()
        done = subprocess.run([*map(str, line)], cwd=empty, env=clean(), capture_output=True, text=True, check=False)
        print(json.dumps({"step": name, "exit code": done.returncode, "seconds": round(time.monotonic() - began)}), flush=True)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            return 1
    print(json.dumps({"records": [str(path) for path in empty.glob("saved/runs/*/record.json")]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
