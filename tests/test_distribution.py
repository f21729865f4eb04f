"""The source distribution and the wheel have the files of the checkout, and the wheel runs without one."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path

import distribution
import pytest
import setuptools

ROOT = distribution.ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution and wheel."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    return distribution.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], str]:
    """The function of setup.py that makes the description."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["description"]


def test_links_of_the_readme_lead_somewhere_on_pypi(described: Callable[[str, str | None], str]) -> None:
    text = "see [`a`](a.md#b), [the claims](#claims), [RecBole](https://recbole.io) and [x [1]](docs/x.md)"
    assert described(text, None) == "see `a`, the claims, [RecBole](https://recbole.io) and x [1]"
    blob = "https://git.example/me/it/blob/main"
    found = described(text, "https://git.example/me/it")
    assert found == f"see [`a`]({blob}/a.md#b), the claims, [RecBole](https://recbole.io) and [x [1]]({blob}/docs/x.md)"
    whole = described((ROOT / "README.md").read_text(encoding="utf-8"), None)
    targets = re.findall(r"\]\(([^)]+)\)", whole)
    assert targets and all(target.startswith("https://") for target in targets)


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package_and_the_property_files(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    package = {path for path in distribution.tracked() if path.startswith("recbole_llm/")}
    properties = {f"recbole_llm/{path}" for path in distribution.tracked() if re.match(r"properties/.*\.(yaml|hyper)$", path)}
    assert any(name.endswith(".hyper") for name in properties) and {".html", ".css"} <= {Path(name).suffix for name in package}
    assert held == package | properties
    found = message_from_string(metadata)
    assert found["Description-Content-Type"] == "text/markdown" and "](docs/" not in str(found.get_payload())


@pytest.mark.slow
def test_a_source_distribution_holds_the_checkout(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("recbole_llm.egg-info/")}
    expected = {path for path in distribution.tracked() if not path.startswith(".") or path == ".importlinter"}
    assert held - made == expected - made


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(built: tuple[Path, Path], data_path: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "site")  # noqa: S202  our own; pip, which does the same, is not in every environment
    empty = tmp_path / "empty"
    empty.mkdir()

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-P", *arguments]
        done = subprocess.run(line, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    folder = "from recbole_llm.config.property_files import properties_folder as f; print(f())"
    assert Path(python("-c", folder).strip()) == tmp_path / "site" / "recbole_llm" / "properties"
    assert "LoRACocktail" in python("-m", "recbole_llm.cli", "run", "--help")
    run = ["run", "--model=NearestTitles", "--dataset=tiny", f"--data_path={data_path}"]
    assert "run record: saved/runs/NearestTitles-tiny-" in python("-m", "recbole_llm.cli", *run)
    said = python("-m", "recbole_llm.cli", "doctor", "--checkpoint_dir=saved")
    assert f"recbole-llm {distribution_version()} in {tmp_path / 'site'}" in said and "run records" in said


def distribution_version() -> str:
    import recbole_llm

    return recbole_llm.__version__
