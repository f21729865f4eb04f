"""A fingerprint of code: what is cached is made anew when the code that makes it changes, comments and docstrings aside."""

from __future__ import annotations

import ast
import hashlib
from importlib.util import find_spec
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_fingerprint(*module_names: str) -> str:
    """SHA-256 of the syntax trees of modules, without their docstrings."""
    digest = hashlib.sha256()
    for name in sorted(module_names):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no source of the module {name}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()
