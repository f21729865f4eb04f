"""The hash of code: it changes with what is computed, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recbole_llm.store import code

MAIN = """
from __future__ import annotations
from typing import TYPE_CHECKING
import math
import package.lib
from package import helpers
from package.other import twice
from package.store import files
from package.store.stages import Stage
if TYPE_CHECKING:
    from package import typed

def area(radius: float) -> float:
    return math.pi * twice(radius)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """``write(main=..., other=...)`` writes modules of a package of our own; returns the fingerprint of ``package.main``."""
    folder = tmp_path / "package"
    texts = {
        "__init__": "",
        "main": MAIN,
        "lib": "import package.deep\n",
        "helpers": "ONE = 1\n",
        "other": "def twice(x):\n    return 2 * x\n",
        "deep": "DEEP = 1\n",
        "typed": "Number = int\n",
        "unused": "UNUSED = 1\n",
        "store/__init__": "",
        "store/files": "FILES = 1\n",
        "store/stages": "class Stage: ...\n",
    }
    monkeypatch.setattr(code, "PACKAGE", "package")
    monkeypatch.setattr(code, "_COMPUTES_NOTHING", ("package.store",))
    monkeypatch.syspath_prepend(tmp_path)

    def write(**changes: str) -> str:
        for name, text in {**texts, **{name.replace("__", "/"): text for name, text in changes.items()}}.items():
            file = folder / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        code._tree.cache_clear()  # a process reads a module once
        importlib.invalidate_caches()
        return code.code_fingerprint("package.main")

    yield write
    code._tree.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "package"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "main",
    [
        MAIN + "# a comment\n",
        '"""A docstring of the module."""' + MAIN,
        MAIN.replace("    return", '    """A docstring."""\n    return'),
        MAIN.replace("math.pi * twice(radius)", "(\n        math.pi\n        * twice( radius )\n    )"),
        MAIN.replace("\n\n", "\n\n\n\n"),
    ],
    ids=["comment", "module docstring", "docstring", "parentheses", "blank lines"],
)
def test_comments_docstrings_and_formatting_do_not_count(write: Callable[..., str], main: str) -> None:
    before = write()
    assert main != MAIN and write(main=main) == before


@pytest.mark.parametrize(
    "main",
    [
        MAIN.replace("math.pi *", "math.pi +"),
        MAIN.replace("area", "surface"),
        MAIN.replace("    return", "    radius += 1\n    return"),
        MAIN.replace("import math\n", "import cmath as math\n"),
        MAIN + "NAME = 'a value that is text'\n",
    ],
    ids=["operator", "name", "line", "import", "text"],
)
def test_a_changed_line_counts(write: Callable[..., str], main: str) -> None:
    assert write() != write(main=main)


@pytest.mark.parametrize("module", ["lib", "helpers", "other", "deep"])
def test_a_changed_line_in_an_imported_module_counts(write: Callable[..., str], module: str) -> None:
    before = write()
    assert write(**{module: "import package.deep\nELSE = 1\n"}) != before
    assert write() == before


def test_a_module_may_be_imported_within_a_function_and_in_a_circle(write: Callable[..., str]) -> None:
    main = "def run():\n    from package.other import twice\n    return twice(1)\n"
    other = "import package.main\ndef twice(x):\n    return {} * x\n"
    assert write(main=main, other=other.format(2)) != write(main=main, other=other.format(3))


@pytest.mark.parametrize("module", ["typed", "unused", "store__files", "store__stages", "store____init__"])
def test_neither_types_nor_the_store_nor_what_is_not_imported_count(write: Callable[..., str], module: str) -> None:
    before = write()
    assert write(**{module: "CHANGED = 1\n"}) == before


def test_what_stands_in_both_branches_of_type_checking_counts_where_it_runs(write: Callable[..., str]) -> None:
    main = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import package.typed\nelse:\n    import package.other\n"
    before = write(main=main)
    assert write(main=main, typed="CHANGED = 1\n") == before
    assert write(main=main, other="CHANGED = 1\n") != before


def test_no_other_package_is_imported(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "__init__.py").write_text("raise SystemExit")
    write(main="try:\n    from foreign.part import thing\nexcept ImportError:\n    from package.other import twice\n")
    assert code._tree("package.main")[1] == ("package.other",)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="recbole_llm.nosuch"):
        code.code_fingerprint("recbole_llm.nosuch")


def test_a_module_that_is_not_of_the_package_is_hashed_alone() -> None:
    assert code._closure("colorsys") == {"colorsys"}


def test_the_code_of_a_training_holds_its_loop_and_not_the_store() -> None:
    found = code._closure("recbole_llm.llm.finetune")
    assert {"recbole_llm.llm.finetune", "recbole_llm.llm.lora", "recbole_llm.training.loop"} <= found
    assert not any(name.startswith("recbole_llm.store") for name in found)
    assert code.code_fingerprint("recbole_llm.llm.lora") != code.code_fingerprint("recbole_llm.llm.finetune")
