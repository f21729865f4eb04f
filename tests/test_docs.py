"""The documents agree with the code: pages and settings of every model, the capability table, links, commands and the site."""

from __future__ import annotations

import itertools
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm import cli, registry
from recbole_llm.cli.options import parser
from recbole_llm.config.checks import check
from recbole_llm.config.property_files import PropertyFiles, properties_folder
from recbole_llm.config.values import read_arguments

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", registry.MODELS)
def test_a_model_has_the_same_stem_everywhere(name: str) -> None:
    assert registry.MODELS[name] == f"recbole_llm.model.{name.lower()}"
    assert (ROOT / "properties" / "model" / f"{name}.yaml").is_file()
    page = "shortcuts" if name in registry.SHORTCUTS else name.lower()
    assert (ROOT / "docs" / "models" / f"{page}.md").is_file()


@pytest.mark.parametrize("name", registry.MODELS)
def test_the_capability_table_is_true(name: str) -> None:
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| model | uses_item_text"))
    row = next(line for line in lines if line.startswith(f"| `{name}` "))
    attributes, cells = ([cell.strip() for cell in line.strip("|").split("|")][1:] for line in (head, row))
    model = registry.get_model(name)
    assert {key: cell == "yes" for key, cell in zip(attributes, cells, strict=True)} == {
        key: getattr(model, key) for key in attributes
    }


def test_the_map_of_files_is_the_tree() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Packages and files")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", section, re.MULTILINE)
    listed = {package: sorted(re.findall(r"`(\w+)`", files)) for package, files in rows}
    packages = [path.parent for path in (ROOT / "recbole_llm").glob("*/**/__init__.py")]
    files = {path: sorted({file.stem for file in path.glob("*.py")} - {"__init__"}) for path in packages}
    assert listed == {path.relative_to(ROOT / "recbole_llm").as_posix(): names for path, names in files.items()}
    beside = {file.name for file in (ROOT / "recbole_llm").glob("*.py")} - {"__init__.py"}
    assert beside == set(re.findall(r"`(\w+\.py)`", section))


def test_the_source_tree_of_the_readme_is_whole_and_in_the_order_of_the_layers() -> None:
    tree = re.findall(r"^```\nrun_recbole_llm.py.*?^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    own = re.findall(r"^  (\S+(?: \S+)*)", tree, re.MULTILINE)  # parts of recbole_llm/ are indented
    parts = {module.name for module in pkgutil.iter_modules([str(ROOT / "recbole_llm")])}
    places = {name.removesuffix(".py").rstrip("/"): row for row, names in enumerate(own) for name in names.split()}
    assert set(places) == parts
    layers = ConfigParser()
    layers.read(ROOT / ".importlinter")
    rows = [line.split(" | ") for line in layers["importlinter:contract:layers"]["layers"].split("\n")]
    rows = [[places[name] for name in names if name in places] for names in rows]
    rows = [row for row in rows if row]
    assert all(max(above) < min(below) for above, below in itertools.pairwise(rows))


def test_readme_has_three_set_up_commands() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3 and all(block.count("\n") == 1 for block in blocks)


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.md")]:
        for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", page.read_text()):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What its headings are called in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands() -> Iterator[tuple[Path, str]]:
    """File and command, of every command in a document or a property file."""
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.yaml")]:
        text = file.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^ +|^# |: |\. )(recbole-llm \w+ --.*|python run_recbole_llm.py --.*)$", text, re.MULTILINE):
            yield file, line


def test_rows_of_a_table_have_as_many_cells_as_its_heading() -> None:
    """A vertical bar within a cell needs a backslash, in code too."""
    found = []
    for file in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "properties").rglob("*.md"),
    ]:
        width = 0
        for line in file.read_text(encoding="utf-8").splitlines():
            width = 0 if not line.startswith("|") else width or len(re.findall(r"(?<!\\)\|", line))
            if width and len(re.findall(r"(?<!\\)\|", line)) != width:
                found.append(f"{file.name}: {line[:80]}")
    assert not found


def dotted_names() -> list[str]:
    """Every ``recbole_llm.package.name`` in the documents."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.yaml")]
    return sorted({name for file in files for name in re.findall(r"\brecbole_llm(?:\.[A-Za-z_]\w*)+", file.read_text())})


@pytest.mark.parametrize("name", dotted_names())
def test_python_names_in_the_documents_exist(name: str) -> None:
    pkgutil.resolve_name(name)


def own_keys(page: Path) -> set[str]:
    """Keys that the YAML of a page defines, for a model of the reader's own."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return {key for block in blocks for key in re.findall(r"^(\w+):.*# \(\w+\)", block, re.MULTILINE)}


def test_commands_are_ones_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files, found = PropertyFiles(properties_folder()), list(commands())
    assert len(found) > 50
    for page, line in found:
        line = re.sub(r"=(mydata|mine)\.yaml", "=properties/overall.yaml", line).replace("$seed", "2020").replace("=E", "=2")
        words = shlex.split(line.replace("python run_recbole_llm.py", "recbole-llm run"))
        try:
            _, keys = parser().parse_known_args(words[1:])
            values = read_arguments(cli._keys(keys))
            check({key: value for key, value in values.items() if key not in own_keys(page)}, "a command", files, {})
        except (SystemExit, ValueError) as error:
            raise AssertionError(f"{page}: {line}") from error


def nav() -> set[str]:
    """The pages that mkdocs.yml lists."""

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    return set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_the_site_lists_every_page() -> None:
    pages = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{file.stem}.md" for file in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    added = {"index.md", "changelog.md", "contributing.md", "property-files.md"} | notebooks
    assert nav() - pages == added, "what docs/hooks.py adds"
    assert pages <= nav()


def test_the_api_pages_show_every_package() -> None:
    pages = [file.read_text() for file in (ROOT / "docs" / "api").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"^::: recbole_llm\.(\w+)", page, re.MULTILINE)}
    parts = {module.name for module in pkgutil.iter_modules([str(ROOT / "recbole_llm")])}
    assert shown == parts - {"cli", "compat", "logs"}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "add-a-model" / "index.html").is_file()
    tour = tmp_path / "site" / "notebooks" / "tour"
    page = (tour / "index.html").read_text()
    assert "run_recbole_llm" in page and 'href="../your-data/"' in page and tour.with_suffix(".ipynb").is_file()


def test_no_document_names_a_command_that_is_gone() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.*")]
    files = [file for file in files if file.is_file()]
    gone = re.compile(r"run_leaderboard|run_hyper|-m recbole_llm\.(merging|data)|recbole-llm-")
    assert [file.name for file in files if file.name != "CHANGELOG.md" and gone.search(file.read_text())] == []
