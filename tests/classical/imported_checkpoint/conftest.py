"""A small checkpoint, and copies of it with other content."""

from __future__ import annotations

import collections
import io
import sys
import webbrowser
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Assemble = Callable[..., SimpleNamespace]
STATE = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def same(found: dict[str, torch.Tensor], expected: Any) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == t.dtype and found[name].shape == t.shape and torch.equal(found[name], t)
        for name, t in expected.items()
    )


def changed(file: str, change: Callable[[str, bytes], bytes | None], source: str = "good.pth", **kwargs: Any) -> str:
    """A copy of a torch file whose records, name without folder, went through ``change``; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", **kwargs) as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return file


def repickled(file: str, change: Callable[[bytes], bytes]) -> str:
    return changed(file, lambda name, data: change(data) if name == "data.pkl" else data)


@pytest.fixture
def good() -> str:
    """A small checkpoint with all that RecBole's have."""
    weights = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.Adam([weights])
    weights.sum().backward()
    optimizer.step()
    content = {
        "config": {"hidden_size": 4, "topk": [1, 5]},
        "epoch": 3,
        "state_dict": collections.OrderedDict(STATE),
        "other_parameter": None,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, "good.pth")
    return "good.pth"


TRAP = """
from pathlib import Path
def spring(*args, **kwargs):
    Path("executed").touch()
    return dict
spring()
class New:
    def __new__(cls, *args, **kwargs):
        spring()
        return object.__new__(cls)
class State:
    def __setstate__(self, state): spring()
class Item:
    def __setitem__(self, key, value): spring()
    def append(self, value): spring()
    def add(self, value): spring()
class Extend:
    def extend(self, values): spring()
class Hash:
    def __hash__(self):
        spring()
        return 1
class Arguments:
    def __init__(self, *args): spring()
class Outer:
    inner = spring
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when something was executed; even importing the module ``trap`` makes it appear."""
    Path("trap.py").write_text(TRAP)
    Path("hubconf.py").write_text("from trap import spring")
    monkeypatch.syspath_prepend(str(tmp_path))

    def browser(url: str) -> None:
        Path("executed").touch()

    browser.__module__, browser.__qualname__ = "webbrowser", "open"
    monkeypatch.setattr(webbrowser, "open", browser)
    for module in ("trap", "hubconf"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path / "executed"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def with_opcodes(fragment: bytes, file: str = "evil.pth") -> str:
    def change(data: bytes) -> bytes:
        assert data.endswith(b"u.")  # the end of a dict of several entries
        return data[:-2] + b"K\x07" + fragment + b"u."

    return repickled(file, change)
