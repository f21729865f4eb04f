"""The fast tests in new environments: each Python, with the lowest and with the newest versions that setup.cfg admits.

    pip install uv && python benchmarks/versions.py --json versions.json

``uv`` makes the environments from wheels alone, so the lowest version of a library is the lowest one with a wheel for that
Python. ``UV_TORCH_BACKEND=cpu`` takes the small build of torch. Arguments of pytest follow ``--``, in place of ``-m "not slow"``:

    python benchmarks/versions.py --pythons 3.11 --versions lowest -- tests/llm -m "not slow"

The exit code is 1 if an environment cannot be made or a test fails.
"""

from __future__ import annotations

import argparse
import configparser
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
SHOWN = ("torch", "transformers", "peft", "sentence-transformers", "numpy", "scipy", "pandas")
COLUMNS = ["Python", "versions", *SHOWN, "passed", "failed", "skipped"]
EXTRAS = ("test", "gguf", "sbert")
FAST = ["-m", "not slow"]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def pythons() -> list[str]:
    """The versions of Python that the metadata names."""
    return re.findall(r"^Programming Language :: Python :: (3\.\d+)$", setup_cfg()["metadata"]["classifiers"], re.MULTILINE)


def requirements() -> str:
    """What setup.cfg requires, with the extras that the tests use, as a file of requirements."""
    parser = setup_cfg()
    parts = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in EXTRAS)]
    return "\n".join(part.strip() for part in parts) + "\n"


def recbole() -> str:
    """RecBole's version, which is installed without what it requires."""
    found = re.search(r"^recbole==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("constraints.txt names no version of recbole")
    return found[0]


def make(uv: str, folder: Path, python: str, resolution: str) -> Path:
    """A new environment, or the one that is there, brought up to date; returns its interpreter."""
    environment, wanted = folder / f"{Path(python).name}-{resolution}", folder / "requirements.txt"
    wanted.write_text(requirements(), encoding="utf-8")
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not interpreter.is_file():
        subprocess.run([uv, "venv", "--quiet", "--python", python, environment], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", interpreter]
    wheels = ["--only-binary", ":all:", "--resolution", RESOLUTIONS[resolution]]
    for arguments in ([*wheels, "-r", wanted], ["--no-deps", recbole()], ["--no-deps", "-e", ROOT]):
        subprocess.run([*install, *arguments], check=True)
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """The versions in an environment, of Python and of :data:`SHOWN`."""
    program = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'Python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    )
    done = subprocess.run([interpreter, "-c", program, *SHOWN], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test(interpreter: Path, report: Path, arguments: list[str]) -> tuple[dict[str, int], list[str]]:
    """Run pytest; returns the numbers of tests by their end, and the names of those that failed.

    Raises:
        RuntimeError: pytest came to no end.
    """
    report.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode not in (0, 1) or not report.is_file():
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return counted(report.read_text(encoding="utf-8"))


def counted(report: str) -> tuple[dict[str, int], list[str]]:
    """The numbers of passed, failed and skipped tests of a report of pytest, and the names of those that failed."""
    found, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.fromstring(report).iter("testcase"):  # noqa: S314 (pytest wrote it)
        bad = case.find("failure") is not None or case.find("error") is not None
        end = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        found[end] += 1
        if bad:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return found, failed


def row(uv: str, folder: Path, python: str, resolution: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The cells of an environment, and what to say about it."""
    try:
        interpreter = make(uv, folder, python, resolution)
        installed = versions(interpreter)
        report = folder / f"{Path(python).name}-{resolution}.xml"  # of its own: several may share the folder
        numbers, failed = test(interpreter, report, arguments)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        return [Path(python).name, resolution, *[""] * (len(COLUMNS) - 2)], [f"{python}, {resolution}: {error}"]
    cells = [installed["Python"], resolution, *(installed[name] for name in SHOWN), *map(str, numbers.values())]
    return cells, [f"{installed['Python']}, {resolution}, failed: {name}" for name in failed]


def section(rows: list[list[str]], notes: list[str], arguments: list[str]) -> dict[str, Any]:
    """A section for ``benchmarks/reliability.py --add FILE``."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "part": "versions",
        "title": "Versions: the fast tests at the lowest and the newest versions that setup.cfg admits",
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes,
        "command": shlex.join(["python", "benchmarks/versions.py", *arguments]),
        "machine": f"{os.cpu_count()} cores, {round(memory)} GiB",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=pythons(), metavar="PYTHON", help="versions, or paths of interpreters")
    parser.add_argument("--versions", nargs="+", default=[*RESOLUTIONS], choices=[*RESOLUTIONS])
    parser.add_argument("--folder", type=Path, help="keep the environments there, and use those that are there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a section for benchmarks/reliability.py --add FILE")
    options = parser.parse_args(given[:end])
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("uv is not installed; run: pip install uv")
    print(*COLUMNS, sep="\t", flush=True)
    rows, notes, bad = [], [], False
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for python, resolution in itertools.product(options.pythons, options.versions):
            cells, said = row(uv, folder, python, resolution, given[end + 1 :] or FAST)
            print(*cells, *said, sep="\t", flush=True)
            rows.append(cells)
            notes += said
            bad |= cells[-2] != "0"
    if options.json:
        names = [Path(python).name for python in options.pythons]  # without the places of this machine
        shown = ["--pythons", *names, "--versions", *options.versions, *given[end:]]
        options.json.write_text(json.dumps(section(rows, notes, shown), indent=1) + "\n", encoding="utf-8")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
