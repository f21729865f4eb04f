"""``recbole-llm doctor``: what is installed, on which machine, and what is wrong, with the remedy of each problem.

It works as far as possible where required packages are missing or broken: every fact is read by itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm import __version__, compat
from recbole_llm.doctor.packages import CHECKOUT, Package, packages

PATIENCE = 300.0  # seconds for all imports
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "RECBOLE_LLM_TRACEBACK")


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        required: nothing works until it is mended.
    """

    what: str
    remedy: str
    required: bool = True


@dataclass
class Report:
    """What was found.

    Attributes:
        lines: for the user.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing that is required is wrong."""
        return not any(problem.required for problem in self.problems)

    def __str__(self) -> str:
        shown = [f"{number}. {one.what}: {one.remedy}" for number, one in enumerate(self.problems, start=1)]
        return "\n".join([*self.lines, "", *(["problems", *shown] if shown else ["no problems"])])


def examine(checkpoint_dir: Path) -> Report:
    """Examine the installation, the machine and ``checkpoint_dir``; imports every required package in a process of its own."""
    report = Report([f"recbole-llm {__version__} in {Path(__file__).parents[1]}"])
    report.lines.append(f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}")
    known = _packages(report)
    broken, devices = _probe([one for one in known if not one.feature and one.installed])
    for package, why in broken.items():
        report.problems.append(Problem(f"{package.name} {package.installed} cannot be imported: {why}", _again(package)))
    _machine(report, devices)
    _folders(report, checkpoint_dir, works=report.healthy)
    return report


def _packages(report: Report) -> list[Package]:
    """Report the versions, and return what is needed."""
    try:
        known = packages()
    except importlib.metadata.PackageNotFoundError:
        report.problems.append(
            Problem("this package is not installed, and there is no setup.cfg beside it", "pip install recbole-llm")
        )
        return []
    required, rows = [one for one in known if not one.feature], []
    for one in required:
        version, state = one.installed, "ok"
        fits = version and one.fits(version)
        if version is None:
            state = "missing"
            report.problems.append(Problem(f"{one.name} is not installed", one.command))
        elif fits is False:
            state = "not allowed"
            report.problems.append(Problem(f"{one.name} {version} is installed, and {one.allowed} is allowed", one.command))
        elif fits is None:
            state = "not checked"
        rows.append([one.name, version or "", one.allowed, one.tested or "", state])
    tested = any(one.tested for one in required)
    head = ["package", "installed", "allowed", "tested", ""]
    report.lines += ["", *_table([head, *rows] if tested else [[*row[:3], row[4]] for row in (head, *rows)])]
    features: dict[str, list[Package]] = {}
    for one in known:
        if one.feature:
            features.setdefault(one.feature, []).append(one)
    rows = []
    for feature, parts in features.items():
        absent = [one for one in parts if one.installed is None]
        wrong = [one for one in parts if one.installed and one.fits(one.installed) is False]
        versions = ", ".join(f"{one.name} {one.installed}" for one in parts if one.installed)
        rows.append([feature, "; ".join(one.command for one in absent) if absent else versions])
        for one in wrong:
            what = f"{one.name} {one.installed} is installed, and {one.allowed} is allowed ({feature})"
            report.problems.append(Problem(what, one.command, required=False))
    report.lines += ["", *_table([["for", "installed, or what installs it"], *rows])]
    return known


def _probe(installed: Sequence[Package]) -> tuple[dict[Package, str], Mapping[str, Any]]:
    """Import packages in another process; why some cannot be imported, and what devices torch finds."""
    if not installed:
        return {}, {}
    by_module = {one.module: one for one in installed}
    command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), *by_module]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false"}
    ended = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
        output, code = done.stdout, done.returncode
        if code:
            ended = f"it ends the process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = f"it takes more than {PATIENCE:.0f} s"
    broken: dict[Package, str] = {}
    devices: Mapping[str, Any] = {}
    last = None
    for line in output.splitlines():
        with contextlib.suppress(ValueError):  # a library prints something
            said = json.loads(line)
            last = said.get("importing", last)
            devices = said.get("devices", devices)
            if "failed" in said:
                broken[by_module[said["failed"]]] = " ".join(said["why"].split())[:300]
    if ended and last in by_module:
        broken[by_module[last]] = ended
    return broken, devices


def _again(package: Package) -> str:
    return package.command.replace("pip install", "pip install --force-reinstall", 1)


def _machine(report: Report, devices: Mapping[str, Any]) -> None:
    rows = [["cores", str(os.cpu_count())]]
    if "threads" in devices:
        rows.append(["threads of torch", str(devices["threads"])])
    with contextlib.suppress(ImportError, OSError):
        import psutil

        free, total = compat.available_memory_bytes(), psutil.virtual_memory().total
        rows.append(["memory", f"{_size(free)} available of {_size(total)}"])
    for name, memory, bf16 in devices.get("accelerators", ()):
        rows.append(["accelerator", f"{name}, {_size(memory)}, {'bfloat16' if bf16 else 'no bfloat16'}"])
    if devices and not devices["accelerators"]:
        rows.append(["accelerator", "none that torch sees"])
        if devices.get("bf16"):
            rows.append(["bfloat16", "in this CPU's instructions: with a pretrained LLM, --dtype=bfloat16 is faster"])
        if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            why = "is built without CUDA" if devices["cuda"] is None else f"(CUDA {devices['cuda']}) does not see it"
            remedy = "install the build of torch for your CUDA driver, see pytorch.org; nvidia-smi shows the driver"
            report.problems.append(Problem(f"this machine has nvidia-smi, so probably a GPU, and torch {why}", remedy, False))
    rows += [[name, os.environ[name]] for name in _VARIABLES if name in os.environ]
    report.lines += ["", *_table([["machine", ""], *rows])]


def _folders(report: Report, checkpoint_dir: Path, *, works: bool) -> None:
    rows = [["free on this disk", _size(shutil.disk_usage(Path.cwd()).free)]]
    if not any(
        (folder / "overall.yaml").is_file() for folder in (Path(__file__).parents[1] / "properties", CHECKOUT / "properties")
    ):
        report.problems.append(
            Problem("the property files of this package are missing", "pip install --force-reinstall recbole-llm")
        )
    if not os.access(Path.cwd(), os.W_OK):
        what = f"{Path.cwd()} cannot be written to, and runs write saved/ and log/ there"
        report.problems.append(Problem(what, "start in another folder"))
    with contextlib.suppress(ImportError, OSError):
        from huggingface_hub.constants import HF_HUB_CACHE

        rows.append(["models from the hub", f"{_size(_total(Path(HF_HUB_CACHE)))} in {HF_HUB_CACHE}"])
    report.lines += ["", *_table([["disk", ""], *rows])]
    if not works or not checkpoint_dir.is_dir():
        report.lines.append(f"{checkpoint_dir}: {'not measured' if checkpoint_dir.is_dir() else 'no results of runs yet'}")
        return
    from recbole_llm.store.leftovers import contents

    try:
        report.lines += ["", f"{checkpoint_dir} (recbole-llm cache list)", contents(checkpoint_dir)]
    except OSError as error:
        report.problems.append(Problem(f"{checkpoint_dir} cannot be read ({error})", "change its permissions"))


def _total(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns; tabulate may be what is missing."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
