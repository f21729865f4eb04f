"""The documents keep their promises: every model has its page, its settings and a true row in the capability table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from recbole_llm import cli, registry

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", registry.MODELS)
def test_a_model_has_the_same_stem_everywhere(name: str) -> None:
    assert (ROOT / "recbole_llm" / "model" / f"{name.lower()}.py").is_file()
    assert (ROOT / "properties" / "model" / f"{name}.yaml").is_file()
    assert (ROOT / "docs" / "models" / f"{name.lower()}.md").is_file()


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


def test_readme_has_two_set_up_commands() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
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


def commands() -> Iterator[tuple[str, str]]:
    """Page and command, of every command in a document or a property file."""
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.yaml")]:
        text = file.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^    |^# |: |\. )(recbole-llm \w+ --.*|python run_recbole_llm.py --.*)$", text, re.MULTILINE):
            yield str(file.relative_to(ROOT)), line


def test_commands_are_ones_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = list(commands())
    assert len(found) > 30
    for page, line in found:
        words = shlex.split(line.replace("python run_recbole_llm.py", "recbole-llm run").replace("=mydata.yaml", "="))
        try:
            _, keys = cli._parser().parse_known_args(words[1:])
            cli._keys(keys)
        except (SystemExit, ValueError) as error:
            raise AssertionError(f"{page}: {line}") from error


def test_no_document_names_a_command_that_is_gone() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "properties").rglob("*.*")]
    files = [file for file in files if file.is_file()]
    gone = re.compile(r"run_leaderboard|run_hyper|-m recbole_llm\.(merging|data)|recbole-llm-")
    assert [file.name for file in files if file.name != "CHANGELOG.md" and gone.search(file.read_text())] == []
