"""Fingerprint of the code that computes a result: a hash of the syntax trees of its modules.

Comments, docstrings and formatting are ignored. The hash of a module includes the modules of ``recbole_llm`` that it imports,
except those that only store, predict or show: :mod:`recbole_llm.store`, :mod:`recbole_llm.costs`, the log and plots.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

PACKAGE = "recbole_llm"
_COMPUTES_NOTHING = tuple(f"{PACKAGE}.{name}" for name in ("store", "costs", "logs", "evaluation.plots", "merging.report"))


def code_fingerprint(*modules: str, alone: Iterable[str] = ()) -> str:
    """SHA-256 of the code of ``modules`` (dotted names) and of all modules of this package that they import.

    Args:
        alone: modules that are hashed without their imports.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = sha256()
    for name in sorted(_closure(*modules) | set(alone)):
        digest.update(f"{name}\n{_tree(name)[0]}\n".encode())
    return digest.hexdigest()


def has_code(module: str) -> bool:
    """Whether there is a file of Python code of that module (a dotted name)."""
    file = _file(module)
    return file is not None and file.suffix == ".py"


def _closure(*modules: str) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _tree(name)[1]
    return found


@cache
def _tree(name: str) -> tuple[str, tuple[str, ...]]:
    """The syntax tree of a module as text, and the modules of this package that it imports."""
    file = _file(name)
    if file is None:
        raise ModuleNotFoundError(f"there is no module {name}")
    tree = ast.parse(file.read_bytes())
    imports = tuple(sorted({module for node in _statements(tree, running=True) for module in _imported(node)}))
    for node in _statements(tree):
        if body := getattr(node, "body", None):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.unparse(tree), imports


def _file(name: str) -> Path | None:
    """The source file of a module, or None; only the packages that contain it are imported."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _statements(node: ast.AST, *, running: bool = False) -> Iterator[ast.AST]:
    """A node and the statements within it, which hold all imports and docstrings; no expressions, of which there are far more.

    Args:
        running: leave out the body of ``if TYPE_CHECKING``.
    """
    yield node
    only_types = running and isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for block in ("orelse",) if only_types else ("body", "orelse", "finalbody", "handlers", "cases"):
        for part in getattr(node, block, ()):
            yield from _statements(part, running=running)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{PACKAGE}."):
        # of this package alone: to look for a module in another one is to import that one
        names = [f"{node.module}.{alias.name}" if _file(f"{node.module}.{alias.name}") else node.module for alias in node.names]
    else:
        return
    yield from (name for name in names if name.startswith(f"{PACKAGE}.") and not name.startswith(_COMPUTES_NOTHING))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
